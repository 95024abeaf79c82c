"""Phi-3 and Phi-4: fused projections, rotary positions of a part of each head, LongRoPE, and in some a window."""

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
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_SUPPORTED = ("sliding_window", "partial_rotary_factor")
# What the first releases called LongRoPE.
_OLD_NAMES = ("su", "yarn")


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in _OLD_NAMES:
        config = {**config, "rope_scaling": {**scaling, "rope_type": "longrope"}}
    read = ConfigReader(config, _DEFAULTS, _SUPPORTED)
    kind = LayerKind(read.rope(head_dim(read)), read.optional("sliding_window"))
    return decoder_config(read, FAMILY.architecture, activation=silu(read), kinds=(kind,))


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *attention_weights(config, fused=True),
        *mlp_weights(config, fused=True),
    ]


FAMILY = Family("Phi3ForCausalLM", "phi3", parse, weights)
