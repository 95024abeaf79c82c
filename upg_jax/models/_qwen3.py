"""Qwen3: Qwen2 with norms of each head's queries and keys instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig
from upg_jax.models._family import (
    NORMS,
    Family,
    attention_weights,
    decoder_config,
    head_norm_weights,
    mlp_weights,
    norm_weights,
    outer_weights,
    silu,
)
from upg_jax.models._names import ATTENTION_INPUTS
from upg_jax.models._qwen2 import DEFAULTS, SUPPORTED, layers
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config, DEFAULTS | {"head_dim": 128}, SUPPORTED)
    return decoder_config(
        read,
        FAMILY.architecture,
        activation=silu(read),
        attention_bias=read.flag("attention_bias", False),
        **layers(read),
    )


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    biases = (*ATTENTION_INPUTS, "o_proj") if config.attention_bias else ()
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *head_norm_weights(config),
        *attention_weights(config, biases=biases),
        *mlp_weights(config),
    ]


FAMILY = Family("Qwen3ForCausalLM", "qwen3", parse, weights)
