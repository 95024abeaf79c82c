"""Dense matrix or sparse entries -> `MdCSR`, on the host, with bounded temporary memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from upg_jax._errors import EncodingError
from upg_jax._index import INDEXES, Index, dense_row_entries, index_bytes, mask_from_deltas
from upg_jax._mdcsr import MANIFOLDS, Manifold, MdCSR
from upg_jax._quantize import quantize_entries

MAX_DELTA = 255
MAX_ENTRIES = 2**31 - 1

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
    row_alignment: int = 1,
    capacity: int | None = None,
    index: Index = "delta8",
) -> MdCSR:
    """`MdCSR.from_dense` with NumPy planes, for callers that write files."""
    w = np.asarray(w)
    if w.ndim != 2:
        raise EncodingError(
            f"from_dense: w must be a matrix (out_features, in_features); got shape {w.shape}"
        )
    if w.dtype not in _ORIGINAL_DTYPES:
        raise EncodingError(
            f"from_dense: w must be float32, bfloat16, float16 or float64; got {w.dtype}; convert it first"
        )
    if manifold not in MANIFOLDS:
        raise EncodingError(f"from_dense: manifold must be one of {MANIFOLDS}; got {manifold!r}")
    if index not in INDEXES:
        raise EncodingError(f"from_dense: index must be one of {INDEXES}; got {index!r}")
    _check_alignment(row_alignment)
    kept = kept_weights(w, density, mask)
    chunks = []
    scales = np.zeros(w.shape[0], np.float32)
    for start, stop in _row_chunks(w.shape):
        chunk = _as_float32(w[start:stop])
        _check_finite(chunk, w, start)
        rows, columns = np.nonzero(kept(start, stop))
        entries, scales[start:stop] = quantize_entries(
            rows, columns, chunk[rows, columns], num_rows=stop - start, manifold=manifold, first_row=start
        )
        chunks.append(encode_chunk(entries, (stop - start, w.shape[1]), row_alignment, index))
    return assemble(
        chunks,
        scales,
        shape=(w.shape[0], w.shape[1]),
        manifold=manifold,
        row_alignment=row_alignment,
        dtype=_ORIGINAL_DTYPES[w.dtype],
        capacity=capacity,
        index=index,
    )


def encode_levels(levels: np.ndarray, scales: np.ndarray, *, dtype: Any, index: Index = "delta8") -> MdCSR:
    """Encodes weights that are quantized already, on the unit manifold, with NumPy planes.

    Args:
        levels: int8 `(out_features, in_features)` in -127..127; 0 is not stored.
        scales: float32 `(out_features,)`, normal numbers, or 0 for a row without weights.
        dtype: that the weights had.
        index: how entries find their columns.

    Raises:
        EncodingError: if the entries exceed the format's limit of 2**31 - 1.
    """
    chunks = []
    for start, stop in _row_chunks(levels.shape):
        rows, columns = np.nonzero(levels[start:stop])
        entries = (rows, columns, levels[start:stop][rows, columns])
        chunks.append(encode_chunk(entries, (stop - start, levels.shape[1]), 1, index))
    return assemble(
        chunks,
        scales,
        shape=(levels.shape[0], levels.shape[1]),
        manifold="unit",
        row_alignment=1,
        dtype=_ORIGINAL_DTYPES[np.dtype(dtype)],
        index=index,
    )


def encode_chunk(
    entries: tuple[np.ndarray, ...], size: tuple[int, int], row_alignment: int, index: Index
) -> EncodedRows:
    """The planes of `size` rows and columns, from entries as `quantize_entries` makes them."""
    if index == "dense":
        return encode_dense_rows(*entries, size=size, row_alignment=row_alignment)
    encoded = encode_entries(*entries, num_rows=size[0], row_alignment=row_alignment)
    if index == "mask":
        pointers = np.concatenate([[0], np.cumsum(encoded.row_lengths)]).astype(np.uint32)
        bits = mask_from_deltas(encoded.delta_indices, encoded.values, pointers, size, "from_dense")
        encoded = encoded._replace(delta_indices=bits)
    return encoded


class EncodedRows(NamedTuple):
    """Planes of some consecutive rows, not yet joined with their neighbours."""

    values: np.ndarray
    delta_indices: np.ndarray
    prime_indices: np.ndarray | None
    row_lengths: np.ndarray


def encode_entries(
    rows: np.ndarray,
    columns: np.ndarray,
    q: np.ndarray,
    prime_indices: np.ndarray | None = None,
    *,
    num_rows: int,
    row_alignment: int = 1,
) -> EncodedRows:
    """Turns entries with absolute columns into the planes of `num_rows` rows.

    Args:
        rows: `(n,)` integers, non-decreasing, in `[0, num_rows)`.
        columns: `(n,)` integers, strictly increasing within a row.
        q: int8 `(n,)`, nonzero values.
        prime_indices: uint16 `(n,)`, or None for the unit manifold.
        num_rows: rows to encode; rows without entries are empty.
        row_alignment: power of two that row lengths are padded to.

    Returns:
        The planes with fillers for gaps above 255 and for the alignment.
    """
    starts_row = np.empty(rows.shape, bool)
    starts_row[:1] = True
    np.not_equal(rows[1:], rows[:-1], out=starts_row[1:])
    delta = np.diff(columns, prepend=columns.dtype.type(0))
    np.copyto(delta, columns, where=starts_row)
    fillers = np.maximum(delta - 1, 0) // MAX_DELTA
    long_gaps = np.flatnonzero(fillers)

    row_lengths = np.bincount(rows, minlength=num_rows)
    row_lengths += np.bincount(rows[long_gaps], weights=fillers[long_gaps], minlength=num_rows).astype(
        np.int64
    )
    padded = -(-row_lengths // row_alignment) * row_alignment
    padding_before = np.cumsum(padded - row_lengths) - (padded - row_lengths)

    position = np.arange(rows.size) + padding_before[rows]
    if long_gaps.size:
        position += np.cumsum(fillers)
    total = int(padded.sum())
    values = np.zeros(total, np.int8)
    deltas = np.zeros(total, np.uint8)
    values[position] = q
    deltas[position] = delta - fillers * MAX_DELTA
    for gap in range(int(fillers.max(initial=0))):
        deltas[(position - 1 - gap)[fillers > gap]] = MAX_DELTA
    primes = None
    if prime_indices is not None:
        primes = np.zeros(total, np.uint16)
        primes[position] = prime_indices
    return EncodedRows(values, deltas, primes, padded)


def encode_dense_rows(
    rows: np.ndarray,
    columns: np.ndarray,
    q: np.ndarray,
    prime_indices: np.ndarray | None = None,
    *,
    size: tuple[int, int],
    row_alignment: int = 1,
) -> EncodedRows:
    """As `encode_entries` for `size` rows and columns, with index `"dense"`."""
    stride = dense_row_entries(size[1], row_alignment)
    at = rows * stride + columns

    def spread(plane: np.ndarray) -> np.ndarray:
        dense = np.zeros(size[0] * stride, plane.dtype)
        dense[at] = plane
        return dense

    return EncodedRows(
        values=spread(q),
        delta_indices=np.zeros(0, np.uint8),
        prime_indices=None if prime_indices is None else spread(prime_indices),
        row_lengths=np.full(size[0], stride, np.int64),
    )


def assemble(
    chunks: list[EncodedRows],
    scales: np.ndarray,
    *,
    shape: tuple[int, int],
    manifold: Manifold,
    row_alignment: int,
    dtype: str,
    capacity: int | None = None,
    index: Index = "delta8",
) -> MdCSR:
    """Joins encoded rows into one layer with NumPy planes.

    Raises:
        EncodingError: if the entries do not fit the capacity or the format's limit of 2**31 - 1.
    """
    lengths = np.concatenate([c.row_lengths for c in chunks]) if chunks else np.zeros(0, np.int64)
    nnz = int(lengths.sum())
    if nnz > MAX_ENTRIES:
        raise EncodingError(
            f"from_dense: a layer holds at most {MAX_ENTRIES:,} entries; got {nnz:,}; split it"
        )
    length = nnz if capacity is None else capacity
    if length < nnz or length % row_alignment or length > MAX_ENTRIES:
        raise EncodingError(
            f"from_dense: capacity must be a multiple of row_alignment={row_alignment} from the layer's "
            f"{nnz:,} entries to {MAX_ENTRIES:,}; got {capacity:,}"
        )
    row_pointers = np.zeros(shape[0] + 1, np.uint32)
    row_pointers[1:] = np.cumsum(lengths)

    def join(planes: list[np.ndarray], dtype: Any, length: int = length) -> np.ndarray:
        joined = np.zeros(length, dtype)
        used = sum(plane.size for plane in planes)
        np.concatenate(planes or [joined[:0]], out=joined[:used])
        return joined

    return MdCSR(
        values=join([c.values for c in chunks], np.int8),
        delta_indices=join([c.delta_indices for c in chunks], np.uint8, index_bytes(index, shape, length)),
        prime_indices=None
        if manifold == "unit"
        else join([c.prime_indices for c in chunks if c.prime_indices is not None], np.uint16),
        scales=scales,
        row_pointers=row_pointers,
        shape=shape,
        row_alignment=row_alignment,
        dtype=dtype,
        index=index,
    )


def _row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _as_float32(w: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite here, and is refused by name
        return w.astype(np.float32)


def _check_alignment(row_alignment: int) -> None:
    if not isinstance(row_alignment, int) or row_alignment < 1 or row_alignment & (row_alignment - 1):
        raise EncodingError(f"from_dense: row_alignment must be a power of two; got {row_alignment!r}")


def _check_finite(chunk: np.ndarray, w: np.ndarray, first_row: int) -> None:
    # One pass: the sum of a chunk is finite unless an entry is not, or it overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(chunk.sum(dtype=np.float64)):
            return
    row, column = np.argwhere(~np.isfinite(chunk))[0]
    row += first_row
    raise EncodingError(
        f"from_dense: weights must be finite in float32; got {w[row, column]} at row {row}, column {column}"
    )


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
