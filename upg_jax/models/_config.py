"""What the shared decoder needs to know of a model, and a strict reader for Hugging Face configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from upg_jax._errors import CheckpointError
from upg_jax.models._rope import Rope, parse_rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: pre-norm residual blocks of grouped-query attention and a gated MLP.

    Hashable, so that it can be a static argument of jitted functions.

    Attributes:
        architecture: Hugging Face name of the family's class, e.g. `"LlamaForCausalLM"`.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: features of one head; even.
        max_position_embeddings: positions that the model was made for; generation stays within them.
        rms_norm_eps: added to the mean square.
        rope: rotary position embedding.
        tie_word_embeddings: the head is the embedding.
        attention_bias: the four attention projections have biases.
        mlp_bias: the three MLP projections have biases.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: num_key_value_heads must divide num_attention_heads; got {self.num_kv_heads} "
                f"and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"model config: head_dim must be even for rotary positions; got {self.head_dim}"
            )


# Settings of other architectures that change what a model computes, each with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
}


class ConfigReader:
    """Reads a Hugging Face configuration, naming the key in every complaint."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"model config: {key!r} must be a positive integer; got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"model config: {key!r} must be a positive number; got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"model config: {key!r} must be true or false; got {value!r}")
        return value

    def one_of(self, key: str, known: tuple[str, ...], default: str) -> str:
        """One of the known strings."""
        value = self._get(key, default)
        if value not in known:
            raise CheckpointError(f"model config: {key!r} must be one of {', '.join(known)}; got {value!r}")
        return value

    def rope(self) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        return parse_rope(self._config)

    def refuse_other_features(self, supported: tuple[str, ...] = ()) -> None:
        """Refuses settings that would change the result and that this family does not implement.

        Args:
            supported: keys of such settings that the family does implement.
        """
        for key, neutral in _NEUTRAL.items():
            if key not in supported and self._config.get(key) not in neutral:
                raise CheckpointError(
                    f"model config: {key!r} = {self._config[key]!r} is not supported for this architecture"
                )

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"model config: {key!r} is missing")
        return value
