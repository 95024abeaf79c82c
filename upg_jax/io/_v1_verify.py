"""Comparing what a conversion wrote with what it was made from."""

from __future__ import annotations

import numpy as np

from upg_jax._errors import FormatError
from upg_jax._index import row_chunks
from upg_jax._mdcsr import Manifold, MdCSR
from upg_jax._quantize import LARGEST_LEVEL, SMALLEST_SCALE
from upg_jax.io._v1_matrix import V1Matrix, from_layer

# Half the widest gap between neighbouring levels, in units of the row's scale: how far rounding moves a
# weight.
HALF_STEP: dict[Manifold, float] = {"unit": 0.5, "prime": 2667.0}


def check_array(array: np.ndarray, original: np.ndarray, where: str) -> None:
    """Checks that a dense tensor was written bit by bit.

    Raises:
        FormatError: if it was not.
    """
    same = array.dtype == original.dtype and array.shape == original.shape
    if not same or array.tobytes() != original.tobytes():
        raise FormatError(f"{where}: verification: it was not written as it is")


def check_matrix(layer: MdCSR, original: V1Matrix) -> None:
    """Checks that a layer decodes to a version 1 matrix: to the same bits, or floats to within a rounding.

    Raises:
        FormatError: naming tensor, row and column of the first difference.
    """
    written = from_layer(layer, original.where)
    if written.shape != original.shape:
        original.fail(f"verification: the shape must be {original.shape}; {written.shape} was written")
    for first, last in row_chunks(original.pointers):
        ours, theirs = original.entries(first, last), written.entries(first, last)
        expected, got = original.weights(ours, first), written.weights(theirs, first)
        keys, found = (e.rows * original.shape[1] + e.columns for e in (ours, theirs))
        at = np.searchsorted(keys, found)
        extra = np.flatnonzero(np.append(keys, -1)[at] != found)
        if extra.size:
            row, column = first + theirs.rows[extra[0]], theirs.columns[extra[0]]
            original.fail(f"verification: row {row}, column {column}: a weight was written that is not there")
        decoded = np.zeros_like(expected)
        decoded[at] = got
        allowed = _rounding(written, first + ours.rows, expected) if original.scales is None else 0.0
        wrong = np.flatnonzero(~(np.abs(decoded - expected) <= allowed))
        if wrong.size:
            i = wrong[0]
            row, column = first + ours.rows[i], ours.columns[i]
            original.fail(
                f"verification: row {row}, column {column}: {expected[i]} was written as {decoded[i]}"
            )


def check_pruned(layer: MdCSR, w: np.ndarray, density: float, where: str) -> None:
    """Checks that a layer is a dense matrix of which the largest `density` were kept and quantized.

    Raises:
        FormatError: naming tensor, row and column of a weight that is not what it should be.
    """
    written = from_layer(layer, where)
    keep = round(density * w.size)
    stored = rounded_away = 0
    smallest_kept, largest_dropped = np.inf, 0.0
    for first, last in row_chunks(written.pointers):
        entries = written.entries(first, last)
        decoded = np.zeros((last - first, w.shape[1]), np.float32)
        is_stored = np.zeros(decoded.shape, bool)
        decoded[entries.rows, entries.columns] = written.weights(entries, first)
        is_stored[entries.rows, entries.columns] = True
        expected = w[first:last].astype(np.float32)
        near = np.abs(decoded - expected) <= _rounding(written, np.arange(first, last)[:, None], expected)
        wrong = np.argwhere(is_stored & ~near)
        if wrong.size:
            i, column = wrong[0]
            written.fail(
                f"verification: row {first + i}, column {column}: {expected[i, column]} was written as "
                f"{decoded[i, column]}"
            )
        stored += entries.rows.size
        rounded_away += int((near & ~is_stored).sum())
        smallest_kept = min(smallest_kept, np.abs(expected[is_stored]).min(initial=np.inf))
        largest_dropped = max(largest_dropped, np.abs(expected[~is_stored & ~near]).max(initial=0.0))
    if not stored <= keep <= stored + rounded_away or largest_dropped > smallest_kept:
        written.fail(
            f"verification: the {keep:,} largest weights must be kept; {stored:,} are, the smallest of "
            f"magnitude {smallest_kept:.6g}, and one of {largest_dropped:.6g} is not"
        )


def _rounding(written: V1Matrix, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How far quantization to a matrix's scales may have moved weights."""
    assert written.scales is not None
    scales = written.scales[rows]
    step = HALF_STEP[written.manifold] * scales + np.float32(2**-23) * np.abs(weights)
    # A row whose scale would be subnormal is not stored.
    levels = 127 if written.manifold == "unit" else LARGEST_LEVEL
    return np.where(scales > 0, step, SMALLEST_SCALE * np.float32(levels))
