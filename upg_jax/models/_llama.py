"""The Llama family: Llama 2 and 3, SmolLM2, and whatever else declares `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig
from upg_jax.models._family import (
    NORMS,
    Family,
    attention_weights,
    decoder_config,
    mlp_weights,
    norm_weights,
    outer_weights,
    silu,
)
from upg_jax.models._names import ATTENTION_INPUTS
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config, _DEFAULTS)
    return decoder_config(
        read,
        FAMILY.architecture,
        activation=silu(read),
        attention_bias=read.flag("attention_bias", False),
        mlp_bias=read.flag("mlp_bias", False),
    )


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    biases = (*ATTENTION_INPUTS, "o_proj") if config.attention_bias else ()
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *attention_weights(config, biases=biases),
        *mlp_weights(config, biases=config.mlp_bias),
    ]


FAMILY = Family("LlamaForCausalLM", "llama", parse, weights)
