"""Gemma 2 and 3: norms before and after attention and MLP, a GELU, scaled embeddings, layers with and without windows.

Gemma 2 limits scores and logits by a hyperbolic tangent; Gemma 3 normalizes queries and keys instead, and rotates
differently in layers with and without windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig, LayerKind
from upg_jax.models._family import (
    Family,
    attention_weights,
    by_layer,
    decoder_config,
    head_dim,
    head_norm_weights,
    mlp_weights,
    norm_weights,
    outer_weights,
)
from upg_jax.models._names import ATTENTION_INPUTS
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_DEFAULTS_3 = {
    **_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_SUPPORTED = ("sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping")


def parse_2(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads Gemma 2's Hugging Face configuration."""
    read = ConfigReader(config, _DEFAULTS, _SUPPORTED)
    rope = read.rope(head_dim(read))
    return _config(
        read, "Gemma2ForCausalLM", LayerKind(rope, read.optional("sliding_window")), LayerKind(rope)
    )


def parse_3(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads Gemma 3's Hugging Face configuration."""
    read = ConfigReader(config, _DEFAULTS_3, _SUPPORTED)
    dim = head_dim(read)
    local = read.rope(dim, layer_type="sliding_attention", theta="rope_local_base_freq", scaled=False)
    everywhere = read.rope(dim, layer_type="full_attention")
    window = read.optional("sliding_window")
    return _config(read, "Gemma3ForCausalLM", LayerKind(local, window), LayerKind(everywhere))


def _config(read: ConfigReader, architecture: str, local: LayerKind, everywhere: LayerKind) -> DecoderConfig:
    read.one_of("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    count, pattern = read.positive("num_hidden_layers"), read.positive("sliding_window_pattern")
    sliding = read.layer_types(count) or [(i + 1) % pattern > 0 for i in range(count)]
    return decoder_config(
        read,
        architecture,
        norm_offset=1.0,
        activation="gelu_tanh",
        attention_scale=read.number("query_pre_attn_scalar") ** -0.5,
        attention_cap=read.optional_number("attn_logit_softcapping"),
        logit_cap=read.optional_number("final_logit_softcapping"),
        embedding_scale=read.positive("hidden_size") ** 0.5,
        attention_bias=read.flag("attention_bias", False),
        **by_layer(sliding, local, everywhere),
    )


def weights_2(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that a Gemma 2 model has."""
    biases = (*ATTENTION_INPUTS, "o_proj") if config.attention_bias else ()
    return [
        *outer_weights(config),
        *norm_weights(config, _NORMS),
        *attention_weights(config, biases=biases),
        *mlp_weights(config),
    ]


def weights_3(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that a Gemma 3 model has."""
    return [*weights_2(config), *head_norm_weights(config)]


GEMMA_2 = Family("Gemma2ForCausalLM", "gemma2", parse_2, weights_2)
GEMMA_3 = Family("Gemma3ForCausalLM", "gemma3_text", parse_3, weights_3)
