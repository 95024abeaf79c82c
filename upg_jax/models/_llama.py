"""The Llama family: Llama 2 and 3, SmolLM2, and whatever else declares `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax.models._config import ConfigReader, DecoderConfig
from upg_jax.models._family import Family
from upg_jax.models._weights import Weight

_ARCHITECTURE = "LlamaForCausalLM"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face configuration."""
    read = ConfigReader(config)
    read.refuse_other_features()
    # The MLP is gated by SiLU; "swish" is its other name.
    read.one_of("hidden_act", ("silu", "swish"), "silu")
    hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
    return DecoderConfig(
        architecture=_ARCHITECTURE,
        vocab_size=read.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.positive("intermediate_size"),
        num_layers=read.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read.positive("num_key_value_heads", heads),
        head_dim=read.positive("head_dim", max(hidden // heads, 1)),
        max_position_embeddings=read.positive("max_position_embeddings", 2048),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=read.rope(),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        attention_bias=read.flag("attention_bias", False),
        mlp_bias=read.flag("mlp_bias", False),
    )


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists every tensor that the model has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    modules = (
        ("self_attn.q_proj", (queries, hidden), config.attention_bias),
        ("self_attn.k_proj", (keys, hidden), config.attention_bias),
        ("self_attn.v_proj", (keys, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, queries), config.attention_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    block = "model.layers.{layer}."
    found = [
        Weight("embed_tokens", "model.embed_tokens.weight", (config.vocab_size, hidden)),
        Weight("norm", "model.norm.weight", (hidden,)),
        Weight("input_layernorm", f"{block}input_layernorm.weight", (hidden,)),
        Weight("post_attention_layernorm", f"{block}post_attention_layernorm.weight", (hidden,)),
    ]
    if not config.tie_word_embeddings:
        found.append(Weight("lm_head", "lm_head.weight", (config.vocab_size, hidden), linear=True))
    for module, shape, has_bias in modules:
        slot = module.split(".")[1]
        found.append(Weight(slot, f"{block}{module}.weight", shape, linear=True))
        if has_bias:
            found.append(Weight(f"{slot}.bias", f"{block}{module}.bias", shape[:1]))
    return found


def ignored(config: DecoderConfig, name: str) -> bool:
    """Whether a checkpoint may have this tensor although the model does not use it."""
    # Old checkpoints store the rotary frequencies; tied ones may store the head twice.
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


FAMILY = Family(_ARCHITECTURE, "llama", parse, weights, ignored)
