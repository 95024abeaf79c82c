"""Mistral: Llama with a sliding window, which some of its releases do without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig, LayerKind
from upg_jax.models._family import (
    NORMS,
    Family,
    attention_weights,
    decoder_config,
    head_dim,
    mlp_weights,
    norm_weights,
    outer_weights,
    silu,
)
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config, _DEFAULTS, supported=("sliding_window",))
    kind = LayerKind(read.rope(head_dim(read)), read.optional("sliding_window"))
    return decoder_config(read, FAMILY.architecture, activation=silu(read), kinds=(kind,))


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *attention_weights(config),
        *mlp_weights(config),
    ]


FAMILY = Family("MistralForCausalLM", "mistral", parse, weights)
