"""Rotary position embeddings: default, linearly scaled, Llama 3 and LongRoPE frequencies.

RoPE: Su et al., "RoFormer" (2021), in the half-split layout of Hugging Face's checkpoints. LongRoPE: Ding et al.
(2024).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding.

    Attributes:
        frequencies: angle per position of each rotated pair of features, float32 values. Features of a head beyond
            the pairs are left alone.
        long_frequencies: what sequences that may grow beyond `original_context` use instead; None if all are alike.
        original_context: positions that the model was trained for before it was stretched.
        scale: what rotated features are multiplied by.
    """

    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    original_context: int = 0
    scale: float = 1.0

    def angles(self, positions: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
        """Returns scaled cosines and sines, float32 `(batch, tokens, pairs)`.

        Args:
            positions: integers `(batch, tokens)`.
            context: positions that the sequences may come to have. It decides between the two sets of frequencies, so
                that all keys of a sequence are rotated alike, whenever they were computed.
        """
        long = self.long_frequencies is not None and context > self.original_context
        frequencies = self.long_frequencies if long else self.frequencies
        angles = positions.astype(jnp.float32)[:, :, None] * np.asarray(frequencies, np.float32)[None, None]
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads `(batch, tokens, heads, dim)` by `angles`; computed in float32, returned in `x`'s dtype."""
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)


def parse_rope(scaling: Mapping[str, Any], *, dim: int, theta: Any, original: Any, longest: int) -> Rope:
    """Makes a rotary embedding of Hugging Face's parameters for it.

    Args:
        scaling: content of `rope_parameters` (transformers 5) or `rope_scaling` (before).
        dim: rotated features of a head.
        theta: base of the geometric series of wavelengths, where `scaling` has none.
        original: the configuration's `original_max_position_embeddings`, where `scaling` has none.
        longest: the configuration's `max_position_embeddings`.

    Raises:
        CheckpointError: for a kind that is not known, by name, or a value that cannot be.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        raise CheckpointError(
            f"model config: rope type {kind!r} is not supported; this build knows {', '.join(_KINDS)}"
        )
    base = _positive("rope_theta", scaling.get("rope_theta", theta)) ** (-np.arange(0, dim, 2) / dim)
    scaling = {"original_max_position_embeddings": original, **scaling}
    return _KINDS[kind](base, scaling, longest)


def _default(base: np.ndarray, scaling: Mapping[str, Any], longest: int) -> Rope:
    return Rope(frequencies=_values(base))


def _linear(base: np.ndarray, scaling: Mapping[str, Any], longest: int) -> Rope:
    return Rope(frequencies=_values(base / _positive("factor", scaling.get("factor"))))


def _llama3(base: np.ndarray, scaling: Mapping[str, Any], longest: int) -> Rope:
    """Long wavelengths are stretched, short ones kept, and those between interpolated."""
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_positive(key, scaling.get(key)) for key in keys)
    if low >= high:
        raise CheckpointError(
            f"model config: rope 'low_freq_factor' must be below 'high_freq_factor'; got {low} and {high}"
        )
    keep = np.clip((original * base / (2 * np.pi) - low) / (high - low), 0, 1)
    return Rope(frequencies=_values(base * (keep + (1 - keep) / factor)))


def _longrope(base: np.ndarray, scaling: Mapping[str, Any], longest: int) -> Rope:
    """A divisor for each frequency, of two lists: for sequences within the original context, and for longer ones."""
    key = "original_max_position_embeddings"
    original = _positive(key, scaling.get(key))
    short, long = (_divisors(key, scaling.get(key), base.size) for key in ("short_factor", "long_factor"))
    factor = _positive("factor", scaling.get("factor") or longest / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    return Rope(
        frequencies=_values(base / short),
        long_frequencies=_values(base / long),
        original_context=int(original),
        scale=_positive("attention_factor", scaling.get("attention_factor") or scale),
    )


_KINDS: dict[str, Callable[[np.ndarray, Mapping[str, Any], int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _values(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.astype(np.float32).tolist())


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise CheckpointError(f"model config: rope {key!r} must be a positive number; got {value!r}")
    return float(value)


def _divisors(key: str, values: Any, count: int) -> np.ndarray:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise CheckpointError(f"model config: rope {key!r} must be a list of {count} numbers; got {values!r}")
    return np.array([_positive(key, value) for value in values])
