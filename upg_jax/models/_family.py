"""What one family of models adds to the shared decoder, and what most of them have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upg_jax.models._config import DecoderConfig, LayerKind
from upg_jax.models._linear import joined
from upg_jax.models._names import ATTENTION_INPUTS, MLP_INPUTS
from upg_jax.models._reader import ConfigReader
from upg_jax.models._weights import Weight

BLOCK = "model.layers.{layer}."


def unused(config: DecoderConfig, name: str) -> bool:
    """Whether a checkpoint may have this tensor although the model does not use it."""
    # Old checkpoints store the rotary frequencies; tied ones may store the head twice.
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's differences.

    Attributes:
        architecture: Hugging Face name of its class.
        model_type: Hugging Face's short name, for configurations without `architectures`.
        parse: reads a Hugging Face configuration.
        weights: lists every tensor that the model has.
        ignored: whether a checkpoint may have this tensor although the model does not use it.
    """

    architecture: str
    model_type: str
    parse: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: Callable[[DecoderConfig], list[Weight]]
    ignored: Callable[[DecoderConfig, str], bool] = unused


def decoder_config(read: ConfigReader, architecture: str, **differences: Any) -> DecoderConfig:
    """Reads what the families' configurations have in common, under Llama's keys.

    Args:
        read: the configuration.
        architecture: Hugging Face name of the family's class.
        **differences: fields that the family has otherwise.
    """
    heads, dim = read.positive("num_attention_heads"), head_dim(read)
    if "kinds" not in differences:
        differences["kinds"] = (LayerKind(read.rope(dim)),)
    fields = {
        "architecture": architecture,
        "vocab_size": read.positive("vocab_size"),
        "hidden_size": read.positive("hidden_size"),
        "intermediate_size": read.positive("intermediate_size"),
        "layers": (0,) * read.positive("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.positive("num_key_value_heads", heads),
        "head_dim": dim,
        "max_position_embeddings": read.positive("max_position_embeddings"),
        "rms_norm_eps": read.number("rms_norm_eps"),
        "attention_scale": dim**-0.5,
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
    }
    return DecoderConfig(**fields | differences)


def head_dim(read: ConfigReader) -> int:
    """Features of a head."""
    return read.positive(
        "head_dim", max(read.positive("hidden_size") // read.positive("num_attention_heads"), 1)
    )


def silu(read: ConfigReader) -> str:
    """The MLP's activation in most families."""
    # "swish" is its other name.
    read.one_of("hidden_act", ("silu", "swish"), "silu")
    return "silu"


def by_layer(sliding: Sequence[bool], local: LayerKind, everywhere: LayerKind) -> dict[str, Any]:
    """The `kinds` and `layers` of a configuration, from which layers attend through a window, and the two kinds."""
    of_layers = [local if slides else everywhere for slides in sliding]
    kinds = tuple(dict.fromkeys(of_layers))
    return {"kinds": kinds, "layers": tuple(kinds.index(kind) for kind in of_layers)}


def outer_weights(config: DecoderConfig) -> list[Weight]:
    """The embedding, the last norm and the head."""
    found = [
        Weight("embed_tokens", "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)),
        Weight("norm", "model.norm.weight", (config.hidden_size,)),
    ]
    if not config.tie_word_embeddings:
        head = (config.vocab_size, config.hidden_size)
        found.append(Weight("lm_head", "lm_head.weight", head, linear=True))
    return found


def norm_weights(config: DecoderConfig, names: Mapping[str, str]) -> list[Weight]:
    """A block's norms, by their names in the checkpoint."""
    return [Weight(slot, f"{BLOCK}{name}.weight", (config.hidden_size,)) for name, slot in names.items()]


# The names of Llama, which most families kept.
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def head_norm_weights(config: DecoderConfig) -> list[Weight]:
    """The norms of each head's queries and keys."""
    return [
        Weight(name, f"{BLOCK}self_attn.{name}.weight", (config.head_dim,)) for name in ("q_norm", "k_norm")
    ]


def attention_weights(
    config: DecoderConfig, *, fused: bool = False, biases: Sequence[str] = ()
) -> list[Weight]:
    """A block's attention projections.

    Args:
        config: the model's.
        fused: queries, keys and values are one matrix.
        biases: which projections have one.
    """
    hidden, queries, keys = config.hidden_size, config.num_heads, config.num_kv_heads
    rows = [count * config.head_dim for count in (queries, keys, keys)]
    found = _inputs("self_attn", ATTENTION_INPUTS, rows, hidden, "qkv_proj" if fused else None)
    found.append(_matrix("self_attn", "o_proj", (hidden, rows[0])))
    return found + [_bias(weight) for weight in found if weight.slot in biases]


def mlp_weights(config: DecoderConfig, *, fused: bool = False, biases: bool = False) -> list[Weight]:
    """A block's MLP; `fused` if the gate and what it gates are one matrix."""
    hidden, inner = config.hidden_size, config.intermediate_size
    found = _inputs("mlp", MLP_INPUTS, [inner, inner], hidden, "gate_up_proj" if fused else None)
    found.append(_matrix("mlp", "down_proj", (hidden, inner)))
    return found + [_bias(weight) for weight in found if biases]


def _inputs(
    module: str, names: Sequence[str], rows: Sequence[int], hidden: int, fused: str | None
) -> list[Weight]:
    if fused is None:
        return [_matrix(module, name, (count, hidden)) for name, count in zip(names, rows, strict=True)]
    return [Weight(joined(names), f"{BLOCK}{module}.{fused}.weight", (sum(rows), hidden), linear=True)]


def _matrix(module: str, name: str, shape: tuple[int, int]) -> Weight:
    return Weight(name, f"{BLOCK}{module}.{name}.weight", shape, linear=True)


def _bias(weight: Weight) -> Weight:
    return Weight(f"{weight.slot}.bias", weight.name.removesuffix("weight") + "bias", weight.shape[:1])
