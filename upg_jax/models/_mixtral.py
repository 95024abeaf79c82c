"""Mixtral: Mistral with a mixture of experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig, LayerKind
from upg_jax.models._family import (
    BLOCK,
    NORMS,
    Family,
    attention_weights,
    decoder_config,
    head_dim,
    norm_weights,
    outer_weights,
    silu,
)
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_SUPPORTED = ("sliding_window", "num_local_experts")
_MODULE = f"{BLOCK}block_sparse_moe."


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config, _DEFAULTS, _SUPPORTED)
    kind = LayerKind(read.rope(head_dim(read)), read.optional("sliding_window"))
    return decoder_config(
        read,
        FAMILY.architecture,
        activation=silu(read),
        kinds=(kind,),
        experts=read.positive("num_local_experts"),
        experts_per_token=read.positive("num_experts_per_tok"),
    )


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.experts
    shapes = {
        "w1": ("gate_proj", (inner, hidden)),
        "w3": ("up_proj", (inner, hidden)),
        "w2": ("down_proj", (hidden, inner)),
    }
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *attention_weights(config),
        Weight("router", f"{_MODULE}gate.weight", (experts, hidden)),
        *(
            Weight(f"experts.{slot}", f"{_MODULE}experts.{{expert}}.{name}.weight", shape, True, experts)
            for name, (slot, shape) in shapes.items()
        ),
    ]


FAMILY = Family("MixtralForCausalLM", "mixtral", parse, weights)
