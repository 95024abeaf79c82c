"""Dense matrix -> `MdCSR`, on the host, with bounded temporary memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from upg_jax._entries import assemble, encode_chunk
from upg_jax._errors import EncodingError
from upg_jax._index import INDEXES, Index
from upg_jax._mdcsr import MANIFOLDS, Manifold, MdCSR
from upg_jax._quantize import quantize_entries
from upg_jax._quantize_groups import quantize_rows
from upg_jax._values import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    VALUE_BITS,
    groups_of,
    smallest_alignment,
)

_CHUNK_WEIGHTS = 1 << 20
_ORIGINAL_DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float64): "float32",
}


def encode_dense(
    w: Any,
    *,
    density: float | None = None,
    mask: Any | None = None,
    manifold: Manifold = "unit",
    row_alignment: int | None = None,
    capacity: int | None = None,
    index: Index = "delta8",
    value_bits: int = 8,
    group_size: int | None = None,
) -> MdCSR:
    """`MdCSR.from_dense` with NumPy planes, for callers that write files."""
    w = float_matrix(w)
    if manifold not in MANIFOLDS:
        raise EncodingError(f"from_dense: manifold must be one of {MANIFOLDS}; got {manifold!r}")
    if index not in INDEXES:
        raise EncodingError(f"from_dense: index must be one of {INDEXES}; got {index!r}")
    group_size = checked_group_size(value_bits, group_size, manifold)
    row_alignment = _checked_alignment(row_alignment, value_bits)
    kept = kept_weights(w, density, mask)
    chunks = []
    scales = np.zeros(w.shape[0], np.float32)
    group_scales = np.ones((w.shape[0], groups_of(w.shape[1], group_size)), np.uint8)
    for start, stop in _row_chunks(w.shape):
        chunk = finite_float32(w[start:stop], start)
        entries: tuple[np.ndarray, ...]
        if group_size is not None:
            chunk = np.where(kept(start, stop), chunk, np.float32(0))
            q, group_scales[start:stop], scales[start:stop] = quantize_rows(
                chunk, value_bits=value_bits, group_size=group_size, first_row=start
            )
            rows, columns = np.nonzero(q)
            entries = (rows, columns, q[rows, columns])
        else:
            rows, columns = np.nonzero(kept(start, stop))
            entries, scales[start:stop] = quantize_entries(
                rows, columns, chunk[rows, columns], num_rows=stop - start, manifold=manifold, first_row=start
            )
        chunks.append(encode_chunk(entries, (stop - start, w.shape[1]), row_alignment, index, value_bits))
    return assemble(
        chunks,
        scales,
        shape=(w.shape[0], w.shape[1]),
        manifold=manifold,
        row_alignment=row_alignment,
        dtype=_ORIGINAL_DTYPES[w.dtype],
        capacity=capacity,
        index=index,
        value_bits=value_bits,
        group_size=group_size,
        group_scales=group_scales,
    )


def float_matrix(w: Any, where: str = "from_dense") -> np.ndarray:
    """`w` as NumPy's array.

    Raises:
        EncodingError: if it is no matrix, or of a dtype that cannot be encoded.
    """
    w = np.asarray(w)
    if w.ndim != 2:
        raise EncodingError(f"{where}: w must be a matrix (out_features, in_features); got shape {w.shape}")
    if w.dtype not in _ORIGINAL_DTYPES:
        raise EncodingError(
            f"{where}: w must be float32, bfloat16, float16 or float64; got {w.dtype}; convert it first"
        )
    return w


def finite_float32(w: np.ndarray, first_row: int = 0, where: str = "from_dense") -> np.ndarray:
    """Rows of a matrix in float32: themselves where they are.

    Args:
        w: float `(rows, columns)`.
        first_row: the number of row 0 in the matrix, for messages.
        where: what to call the function in messages.

    Raises:
        EncodingError: naming the first weight that is not finite.
    """
    found = _as_float32(w)
    # One pass: the sum is finite unless an entry is not.
    with np.errstate(invalid="ignore"):
        if np.isfinite(found.sum(dtype=np.float64)):
            return found
    row, column = np.argwhere(~np.isfinite(found))[0]
    raise EncodingError(
        f"{where}: weights must be finite in float32; got {w[row, column]} at row {first_row + row}, column {column}"
    )


def checked_group_size(
    value_bits: int, group_size: int | None, manifold: Manifold, where: str = "from_dense"
) -> int | None:
    """The group size of a layer with values of so many bits, the default one if none is given; None for 8 bits.

    Raises:
        EncodingError: for bits, groups or a manifold that the format does not have together.
    """
    if value_bits not in VALUE_BITS:
        raise EncodingError(f"{where}: value_bits must be one of {VALUE_BITS}; got {value_bits!r}")
    if value_bits == 8:
        if group_size is not None:
            raise EncodingError(
                f"{where}: group_size is for values of 4 or 3 bits; got {group_size!r} with value_bits 8"
            )
        return None
    if manifold != "unit":
        raise EncodingError(
            f"{where}: values of {value_bits} bits are for the unit manifold; got manifold {manifold!r}; use "
            "value_bits 8, or manifold 'unit'"
        )
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if not isinstance(group_size, int | np.integer) or group_size not in GROUP_SIZES:
        raise EncodingError(f"{where}: group_size must be one of {GROUP_SIZES}; got {group_size!r}")
    return group_size


def encode_levels(
    levels: np.ndarray,
    scales: np.ndarray,
    *,
    dtype: Any,
    index: Index = "delta8",
    value_bits: int = 8,
    group_scales: np.ndarray | None = None,
    group_size: int | None = None,
) -> MdCSR:
    """Encodes weights that are quantized already, on the unit manifold, with NumPy planes.

    Args:
        levels: int8 `(out_features, in_features)`, values `q` that writers may produce; 0 is not stored.
        scales: float32 `(out_features,)`, normal numbers, or 0 for a row without weights.
        dtype: that the weights had.
        index: how entries find their columns.
        value_bits: of the result.
        group_scales: uint8 `(out_features, groups)`, for values of fewer than 8 bits.
        group_size: columns of a group, for values of fewer than 8 bits.

    Raises:
        EncodingError: if the entries exceed the format's limit of 2**31 - 1.
    """
    chunks = []
    for start, stop in _row_chunks(levels.shape):
        rows, columns = np.nonzero(levels[start:stop])
        entries = (rows, columns, levels[start:stop][rows, columns])
        size = (stop - start, levels.shape[1])
        chunks.append(encode_chunk(entries, size, smallest_alignment(value_bits), index, value_bits))
    return assemble(
        chunks,
        scales,
        shape=(levels.shape[0], levels.shape[1]),
        manifold="unit",
        row_alignment=smallest_alignment(value_bits),
        dtype=_ORIGINAL_DTYPES[np.dtype(dtype)],
        index=index,
        value_bits=value_bits,
        group_size=group_size,
        group_scales=group_scales,
    )


def _row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _as_float32(w: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite here, and is refused by name
        return np.asarray(w, np.float32)


def _checked_alignment(row_alignment: int | None, value_bits: int) -> int:
    least = smallest_alignment(value_bits)
    if row_alignment is None:
        return least
    if not isinstance(row_alignment, int) or row_alignment < 1 or row_alignment & (row_alignment - 1):
        raise EncodingError(f"from_dense: row_alignment must be a power of two; got {row_alignment!r}")
    if row_alignment < least:
        raise EncodingError(
            f"from_dense: row_alignment must be at least {least} with value_bits {value_bits}, so that rows fill whole "
            f"bytes; got {row_alignment}"
        )
    return row_alignment


def kept_weights(w: np.ndarray, density: float | None, mask: Any | None) -> Any:
    """Returns a function from a range of rows to the boolean matrix of weights to keep there."""
    if mask is not None:
        if density is not None:
            raise EncodingError("from_dense: give density or mask, not both")
        mask = np.asarray(mask)
        if mask.shape != w.shape or mask.dtype != np.bool_:
            raise EncodingError(
                f"from_dense: mask must be boolean of w's shape {w.shape}; got {mask.dtype} {mask.shape}"
            )
        return lambda start, stop: mask[start:stop]
    density = 1.0 if density is None else float(density)
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"from_dense: density must be in [0, 1]; got {density}")
    keep = round(density * w.size)
    if keep == w.size:
        return lambda start, stop: np.ones((stop - start, w.shape[1]), bool)
    threshold, ties_to_keep = _magnitude_threshold(w, keep)
    remaining = [ties_to_keep]

    def kept(start: int, stop: int) -> np.ndarray:
        bits = _magnitude_bits(w[start:stop])
        chosen = bits > threshold
        if remaining[0]:
            ties = np.flatnonzero(bits == threshold)[: remaining[0]]
            chosen.reshape(-1)[ties] = True
            remaining[0] -= ties.size
        return chosen

    return kept


def _magnitude_bits(w: np.ndarray) -> np.ndarray:
    """Bits of `|w|` in float32, which sort as the magnitudes do."""
    return np.abs(_as_float32(w)).view(np.uint32)


def _magnitude_threshold(w: np.ndarray, keep: int) -> tuple[int, int]:
    """Finds the `keep`-th largest magnitude by radix selection, a chunk of rows at a time.

    Returns:
        Its float32 bits, and how many of the weights equal to it are to be kept.
    """
    if keep == 0:
        return 2**32 - 1, 0

    def select(histogram: np.ndarray, keep: int) -> tuple[int, int]:
        at_least = np.cumsum(histogram[::-1])[::-1]
        bucket = int(np.flatnonzero(at_least >= keep)[-1])
        return bucket, keep - int(at_least[bucket] - histogram[bucket])

    high = np.zeros(1 << 16, np.int64)
    for start, stop in _row_chunks(w.shape):
        high += np.bincount((_magnitude_bits(w[start:stop]) >> 16).ravel(), minlength=1 << 16)
    high_bucket, keep = select(high, keep)
    low = np.zeros(1 << 16, np.int64)
    for start, stop in _row_chunks(w.shape):
        bits = _magnitude_bits(w[start:stop]).ravel()
        low += np.bincount(bits[bits >> 16 == high_bucket] & 0xFFFF, minlength=1 << 16)
    low_bucket, keep = select(low, keep)
    return high_bucket << 16 | low_bucket, keep
