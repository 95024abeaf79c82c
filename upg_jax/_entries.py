"""Sparse entries with absolute columns -> the planes of an `MdCSR`, on the host, some rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from upg_jax._errors import EncodingError
from upg_jax._index import Index, dense_row_entries, index_bytes, mask_from_deltas
from upg_jax._mdcsr import Manifold, MdCSR
from upg_jax._values import pack_values, value_bytes

MAX_DELTA = 255
MAX_ENTRIES = 2**31 - 1


def encode_chunk(
    entries: tuple[np.ndarray, ...],
    size: tuple[int, int],
    row_alignment: int,
    index: Index,
    value_bits: int = 8,
) -> EncodedRows:
    """The planes of `size` rows and columns, from entries as `quantize_entries` makes them."""
    if index == "dense":
        encoded = encode_dense_rows(*entries, size=size, row_alignment=row_alignment)
    else:
        encoded = encode_entries(*entries, num_rows=size[0], row_alignment=row_alignment)
    if index == "mask":
        pointers = np.concatenate([[0], np.cumsum(encoded.row_lengths)]).astype(np.uint32)
        bits = mask_from_deltas(encoded.delta_indices, encoded.values, pointers, size, "from_dense")
        encoded = encoded._replace(delta_indices=bits)
    return encoded._replace(values=pack_values(encoded.values, value_bits))


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
    value_bits: int = 8,
    group_size: int | None = None,
    group_scales: np.ndarray | None = None,
) -> MdCSR:
    """Joins encoded rows into one layer with NumPy planes; `group_scales` may be given as `(rows, groups)`.

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
        values=join([c.values for c in chunks], np.int8, value_bytes(length, value_bits)),
        delta_indices=join([c.delta_indices for c in chunks], np.uint8, index_bytes(index, shape, length)),
        prime_indices=None
        if manifold == "unit"
        else join([c.prime_indices for c in chunks if c.prime_indices is not None], np.uint16),
        scales=scales,
        group_scales=None if group_size is None else np.asarray(group_scales).reshape(-1),
        row_pointers=row_pointers,
        shape=shape,
        row_alignment=row_alignment,
        dtype=dtype,
        index=index,
        value_bits=value_bits,
        group_size=group_size,
    )
