"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and windows in the last layers if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig, LayerKind
from upg_jax.models._family import (
    NORMS,
    Family,
    attention_weights,
    by_layer,
    decoder_config,
    head_dim,
    mlp_weights,
    norm_weights,
    outer_weights,
    silu,
)
from upg_jax.models._names import ATTENTION_INPUTS
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
SUPPORTED = ("sliding_window", "layer_types")


def layers(read: ConfigReader) -> dict[str, Any]:
    """Which layers attend through a window."""
    window = read.optional("sliding_window") if read.flag("use_sliding_window", False) else None
    count = read.positive("num_hidden_layers")
    sliding = read.layer_types(count) or [i >= read.positive("max_window_layers") for i in range(count)]
    rope = read.rope(head_dim(read))
    return by_layer(sliding, LayerKind(rope, window), LayerKind(rope))


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config, DEFAULTS, SUPPORTED)
    return decoder_config(read, FAMILY.architecture, activation=silu(read), **layers(read))


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    return [
        *outer_weights(config),
        *norm_weights(config, NORMS),
        *attention_weights(config, biases=ATTENTION_INPUTS),
        *mlp_weights(config),
    ]


FAMILY = Family("Qwen2ForCausalLM", "qwen2", parse, weights)
