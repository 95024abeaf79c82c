"""A strict reader of Hugging Face configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax._errors import CheckpointError
from upg_jax.models._rope import Rope, parse_rope

# Settings that change what a model computes, each with the values that change nothing. A family names those that it
# implements; the others are refused.
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
    "use_bidirectional_attention": (None, False),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


class ConfigReader:
    """Reads a Hugging Face configuration, naming the key in every complaint.

    Args:
        config: its content.
        defaults: what keys that it lacks stand for; those that are null stay so.
        supported: settings that change what a model computes and that the family implements.

    Raises:
        CheckpointError: for such a setting that it does not implement.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        supported: tuple[str, ...] = (),
    ) -> None:
        self._config = {**(defaults or {}), **config}
        self._supported = supported
        for key, neutral in _NEUTRAL.items():
            if key not in supported and self._config.get(key) not in neutral:
                raise CheckpointError(
                    f"model config: {key!r} = {self._config[key]!r} is not supported for this architecture"
                )

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"model config: {key!r} must be a positive integer; got {value!r}")
        return value

    def optional(self, key: str) -> int | None:
        """An integer of at least 1, or null."""
        return None if self._config.get(key) is None else self.positive(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"model config: {key!r} must be a positive number; got {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number above 0, or null."""
        return None if self._config.get(key) is None else self.number(key)

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

    def layer_types(self, count: int) -> list[bool] | None:
        """For each layer whether it attends through a sliding window; None where the configuration does not say."""
        types = self._config.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != count or not all(t in _LAYER_TYPES for t in types):
            raise CheckpointError(
                f"model config: 'layer_types' must be one of {', '.join(_LAYER_TYPES)} for each of {count} layers; "
                f"got {types!r}"
            )
        return [kind == "sliding_attention" for kind in types]

    def rope(
        self, head_dim: int, *, layer_type: str | None = None, theta: str = "rope_theta", scaled: bool = True
    ) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Args:
            head_dim: features of a head.
            layer_type: whose parameters these are, where `rope_parameters` has some for each type of layers.
            theta: key of the base.
            scaled: whether `rope_scaling` is for these layers.
        """
        scaling = self._config.get("rope_parameters") or {}
        if layer_type is not None and isinstance(scaling, Mapping):
            scaling = scaling.get(layer_type) or {}
        scaling = scaling or (scaled and self._config.get("rope_scaling")) or {}
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"model config: rope parameters must be an object; got {scaling!r}")
        key = "partial_rotary_factor"
        part = scaling.get(key, self._config.get(key) or 1.0)
        if part != 1.0 and key not in self._supported:
            raise CheckpointError(
                f"model config: {key!r} other than 1 is not supported for this architecture"
            )
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise CheckpointError(f"model config: {key!r} must be above 0 and at most 1; got {part!r}")
        longest = self.positive("max_position_embeddings")
        return parse_rope(
            scaling,
            dim=int(head_dim * part),
            theta=self._config.get(theta) or 10000.0,
            original=self._config.get("original_max_position_embeddings") or longest,
            longest=longest,
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"model config: {key!r} is missing")
        return value
