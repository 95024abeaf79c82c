"""Float weights -> `q`, or `(q, k)` of the prime manifold, and a scale per row (docs/format.md, section 2)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from upg_jax._errors import EncodingError
from upg_jax._mdcsr import Manifold
from upg_jax._primes import LARGEST_PRIME, prime_table
from upg_jax._values import LARGEST_MULTIPLIER, largest_q

LARGEST_LEVEL = 127 * LARGEST_PRIME
# Scales outside [SMALLEST_SCALE, LARGEST_SCALE] could make a decoded weight subnormal or infinite; the bound
# takes -128, which readers accept, times the largest prime.
SMALLEST_SCALE = np.float32(2.0**-126)
LARGEST_SCALE = np.float32(np.finfo(np.float32).max / np.float32(128 * LARGEST_PRIME))


def quantize_entries(
    rows: np.ndarray,
    columns: np.ndarray,
    weights: np.ndarray,
    *,
    num_rows: int,
    manifold: Manifold,
    first_row: int = 0,
    scales: np.ndarray | None = None,
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Quantizes float weights with absolute columns, row by row.

    Args:
        rows: `(n,)` integers, non-decreasing, in `[0, num_rows)`.
        columns: `(n,)` integers.
        weights: float32 `(n,)`, finite.
        num_rows: rows to quantize; rows without entries get scale 0.
        manifold: of the result.
        first_row: the number of row 0 in the matrix, for messages.
        scales: float32 `(num_rows,)`, instead of those with which rows use all levels.

    Returns:
        The entries that are not 0, as `encode_entries` takes them, and the scales, float32 `(num_rows,)`.

    Raises:
        EncodingError: if a row is too large for the format.
    """
    if scales is None:
        largest = np.zeros(num_rows, np.float32)
        if weights.size:
            boundaries = np.flatnonzero(np.diff(rows, prepend=-1))
            largest[rows[boundaries]] = np.maximum.reduceat(np.abs(weights), boundaries)
        scales = scales_of(largest, manifold, first_row)
    row_scales = scales[rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        targets = np.where(row_scales > 0, weights.astype(np.float64) / row_scales, 0.0)
    if manifold == "unit":
        q = np.clip(np.rint(targets), -127, 127).astype(np.int8)
        stored = q != 0
        return (rows[stored], columns[stored], q[stored]), scales
    magnitude, k = nearest_levels(np.abs(targets))
    stored = magnitude != 0
    q = np.where(np.signbit(targets), -magnitude, magnitude)
    return (rows[stored], columns[stored], q[stored], k[stored]), scales


def scales_of(
    largest: np.ndarray, manifold: Manifold, first_row: int = 0, *, value_bits: int = 8
) -> np.ndarray:
    """The scales with which rows use all levels.

    Args:
        largest: float32 `(rows,)`, each row's largest magnitude.
        manifold: of the result.
        first_row: the number of row 0 in the matrix, for messages.
        value_bits: of the result.

    Raises:
        EncodingError: if a row is too large for the format.
    """
    scales = largest / np.float32(largest_level(manifold, value_bits))
    too_large = np.flatnonzero(scales > LARGEST_SCALE)
    if too_large.size:
        row = int(too_large[0])
        raise EncodingError(
            f"from_dense: row {first_row + row} has a magnitude of {largest[row]:.3g}; its scale {scales[row]:.3g} "
            f"exceeds the format's largest, {LARGEST_SCALE:.3g}; rescale the matrix"
        )
    scales[scales < SMALLEST_SCALE] = 0
    return scales


def largest_level(manifold: Manifold, value_bits: int) -> int:
    """The largest level that writers produce."""
    if manifold == "prime":
        return LARGEST_LEVEL
    return largest_q(value_bits) * (1 if value_bits == 8 else LARGEST_MULTIPLIER)


class _Levels(NamedTuple):
    """The distinct products `q * P[k]`, 0 and `q` in 1..127, in increasing order."""

    product: np.ndarray
    q: np.ndarray
    k: np.ndarray
    # For every integer up to the largest product, the index of the level at or below it.
    at_or_below: np.ndarray


@functools.cache
def _levels() -> _Levels:
    products = np.outer(np.arange(1, 128, dtype=np.int32), prime_table().astype(np.int32))
    product, first = np.unique(products, return_index=True)
    q, k = np.divmod(first, products.shape[1])
    product = np.concatenate([np.zeros(1, np.int32), product])
    return _Levels(
        product=product,
        q=np.concatenate([[0], q + 1]).astype(np.int8),
        k=np.concatenate([[0], k]).astype(np.uint16),
        at_or_below=np.repeat(
            np.arange(product.size, dtype=np.int32), np.diff(product, append=LARGEST_LEVEL + 1)
        ),
    )


def nearest_levels(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each target the `(q, k)` whose product `q * P[k]` is nearest, jointly over both.

    Args:
        targets: float64 `(n,)`, non-negative, in units of the row's scale.

    Returns:
        `q` as int8 in 0..127 and `k` as uint16. A target half-way takes the smaller product.
    """
    levels = _levels()
    below = levels.at_or_below[np.minimum(targets, LARGEST_LEVEL).astype(np.int32)]
    above = np.minimum(below + 1, levels.product.size - 1)
    nearest = np.where(levels.product[above] - targets < targets - levels.product[below], above, below)
    return levels.q[nearest], levels.k[nearest]
