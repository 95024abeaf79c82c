"""Rotary position embeddings: the default, linearly scaled and Llama 3 frequencies.

RoPE: Su et al., "RoFormer" (2021), in the half-split layout of Hugging Face's checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import CheckpointError

_KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of a rotary embedding.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: `"default"`, `"linear"` or `"llama3"`.
        factor: what the last two stretch (long) wavelengths by.
        low_freq_factor: llama3 stretches wavelengths above `original_context / low_freq_factor` fully,
        high_freq_factor: those below `original_context / high_freq_factor` not at all, and interpolates between.
        original_context: positions that the model was trained for before stretching.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self, dim: int) -> np.ndarray:
        """Returns the angle per position of each of the `dim // 2` rotated pairs, float32."""
        frequency = self.theta ** (-np.arange(0, dim, 2) / dim)
        if self.kind == "linear":
            frequency = frequency / self.factor
        if self.kind == "llama3":
            turns = self.original_context * frequency / (2 * np.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0, 1)
            frequency = frequency * (keep + (1 - keep) / self.factor)
        return frequency.astype(np.float32)

    def angles(self, positions: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines, float32 `(batch, tokens, dim // 2)`, for positions `(batch, tokens)`."""
        angles = positions.astype(jnp.float32)[:, :, None] * self.frequencies(dim)[None, None]
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads `(batch, tokens, heads, dim)` by `angles`; computed in float32, returned in `x`'s dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def parse_rope(config: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises:
        CheckpointError: for a kind that is not known, by name, or a value that cannot be.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"model config: rope parameters must be an object; got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        raise CheckpointError(
            f"model config: rope type {kind!r} is not supported; this build knows {', '.join(_KINDS)}"
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("model config: 'partial_rotary_factor' other than 1 is not supported")

    def positive(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"model config: rope {key!r} must be a positive number; got {value!r}")
        return float(value)

    theta = positive("rope_theta", scaling.get("rope_theta", config.get("rope_theta") or 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    factor = positive("factor", scaling.get("factor"))
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    low, high, original = (
        positive(key, scaling.get(key))
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low >= high:
        raise CheckpointError(
            f"model config: rope 'low_freq_factor' must be below 'high_freq_factor'; got {low} and {high}"
        )
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=int(original),
    )
