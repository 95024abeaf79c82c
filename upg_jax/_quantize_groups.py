"""Float weights -> values of fewer than 8 bits and an integer multiplier for each group of columns.

The level of an entry is `q * m` (docs/format.md, section 2). A row's scale makes 255 times the largest `q` its largest
magnitude, and a group's multiplier is the one, of a few below the group's largest magnitude over the largest `q`, whose
values are nearest to the weights: clipping one weight can be better than rounding the others more coarsely.

`choose_multipliers` and `quantize` take NumPy arrays, or JAX arrays under jit as SparseGPT has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from upg_jax._quantize import scales_of
from upg_jax._values import LARGEST_MULTIPLIER, groups_of, largest_q

# Of the multiplier with which nothing is clipped.
_FRACTIONS = tuple(np.float32(n / 20) for n in range(20, 9, -1))


def quantize_rows(
    w: np.ndarray, *, value_bits: int, group_size: int, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes some rows of a matrix.

    Args:
        w: float32 `(rows, columns)`, finite, 0 where nothing is kept.
        value_bits: 4 or 3.
        group_size: columns of a group.
        first_row: the number of row 0 in the matrix, for messages.

    Returns:
        Values, int8 `(rows, columns)`; multipliers, uint8 `(rows, groups)`; scales, float32 `(rows,)`.

    Raises:
        EncodingError: if a row is too large for the format.
    """
    rows, columns = w.shape
    scales = scales_of(np.abs(w).max(axis=1, initial=0.0), "unit", first_row, value_bits=value_bits)
    groups = groups_of(columns, group_size)
    targets = np.zeros((rows, groups * group_size), np.float32)
    np.divide(w, scales[:, None], out=targets[:, :columns], where=scales[:, None] > 0)
    grouped = targets.reshape(rows, groups, group_size)
    multipliers = choose_multipliers(grouped, value_bits, np)
    q = quantize(grouped, multipliers[..., None], value_bits, np)
    return (
        q.reshape(rows, groups * group_size)[:, :columns].astype(np.int8),
        multipliers.astype(np.uint8),
        scales,
    )


def quantize_again(
    w: np.ndarray,
    scales: np.ndarray,
    multipliers: np.ndarray,
    *,
    value_bits: int,
    group_size: int,
    first_row: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`quantize_rows`, but rows that these scales and multipliers still make exactly keep both."""
    q, new_multipliers, new_scales = quantize_rows(
        w, value_bits=value_bits, group_size=group_size, first_row=first_row
    )
    of_columns = np.repeat(multipliers, group_size, axis=1)[:, : w.shape[1]].astype(np.float64)
    units = scales.astype(np.float64)[:, None] * of_columns
    old_q = quantize(np.divide(w, units, out=np.zeros(w.shape), where=units > 0), 1.0, value_bits, np)
    same = ((old_q * of_columns).astype(np.float32) * scales[:, None] == w).all(axis=1)
    return (
        np.where(same[:, None], old_q, q).astype(np.int8),
        np.where(same[:, None], multipliers, new_multipliers),
        np.where(same, scales, new_scales),
    )


def choose_multipliers(targets: Any, value_bits: int, xp: Any) -> Any:
    """The multiplier of each group, as float32 `(...)`; 1 for one without weights.

    Args:
        targets: float32 `(..., group_size)`, weights over their row's scale, 0 where nothing is kept.
        value_bits: 4 or 3.
        xp: `numpy` or `jax.numpy`.
    """
    magnitudes = xp.abs(targets)
    widest = magnitudes.max(axis=-1) / largest_q(value_bits)
    best = xp.ones_like(widest)
    least = xp.full_like(widest, np.inf)
    for fraction in _FRACTIONS:
        multipliers = xp.clip(xp.rint(widest * fraction), 1, LARGEST_MULTIPLIER)
        levels = quantize(magnitudes, multipliers[..., None], value_bits, xp) * multipliers[..., None]
        error = xp.square(magnitudes - levels).sum(axis=-1)
        best, least = xp.where(error < least, multipliers, best), xp.minimum(error, least)
    return best


def quantize(targets: Any, multipliers: Any, value_bits: int, xp: Any) -> Any:
    """The values nearest to weights, as float32; the level is their product with the multipliers.

    Args:
        targets: float32, weights over their row's scale.
        multipliers: float32, of their groups; broadcast.
        value_bits: 4 or 3.
        xp: `numpy` or `jax.numpy`.
    """
    largest = largest_q(value_bits)
    return xp.clip(xp.rint(targets / multipliers), -largest, largest)
