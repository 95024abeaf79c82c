"""The three ways in which an entry finds its column (docs/format.md, section 1): sizes, and conversions on the host.

Everything here takes the NumPy planes of one layer. Conversions need what the structural rules say of row pointers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from upg_jax import _native
from upg_jax._errors import FormatError

Index: TypeAlias = Literal["delta8", "mask", "dense"]

INDEXES: tuple[Index, ...] = ("delta8", "mask", "dense")

_CHUNK_ENTRIES = 1 << 22
_MASK_WORD = 64
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def mask_row_bytes(in_features: int) -> int:
    """Bytes of one row's bits with index `"mask"`: whole words of 64 columns."""
    return -(-in_features // _MASK_WORD) * (_MASK_WORD // 8)


def dense_row_entries(in_features: int, row_alignment: int) -> int:
    """Entries of one row with index `"dense"`: one for each column, then padding to the alignment."""
    return -(-in_features // row_alignment) * row_alignment


def index_bytes(index: str, shape: tuple[int, int], capacity: int) -> int:
    """Length of a layer's `delta_indices` plane."""
    if index == "mask":
        return shape[0] * mask_row_bytes(shape[1])
    return capacity if index == "delta8" else 0


def row_chunks(pointers: np.ndarray, weights_per_row: int = 0) -> list[tuple[int, int]]:
    """Splits rows into ranges of about `_CHUNK_ENTRIES` entries, and of as many weights."""
    rows = pointers.size - 1
    cuts = np.searchsorted(pointers, np.arange(0, int(pointers[-1]) + 1, _CHUNK_ENTRIES, dtype=np.int64))
    by_weights = np.arange(0, rows, max(_CHUNK_ENTRIES // max(weights_per_row, 1), 1))
    edges = np.unique(np.concatenate([[0], np.minimum(cuts, rows), by_weights, [rows]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def row_lengths(pointers: np.ndarray) -> np.ndarray:
    """Entries of each row, int64."""
    return np.diff(pointers.astype(np.int64))


def mask_counts(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bits set in each row of a mask, int64."""
    out_features, in_features = shape
    rows = mask.reshape(out_features, mask_row_bytes(in_features))
    counts = [_BITS_SET[part].sum(axis=1, dtype=np.int64) for part in _parts(rows)]
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def first_row_outside_mask(mask: np.ndarray, shape: tuple[int, int]) -> int | None:
    """The first row with a bit beyond the matrix's columns, or None."""
    out_features, in_features = shape
    if in_features % _MASK_WORD == 0:
        return None
    last = mask.reshape(out_features, mask_row_bytes(in_features))[:, -(_MASK_WORD // 8) :]
    outside = np.unpackbits(last, axis=1, bitorder="little")[:, in_features % _MASK_WORD :].any(axis=1)
    return int(np.argmax(outside)) if outside.any() else None


def is_good_mask(mask: np.ndarray, pointers: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether the compiled check finds no bit outside the matrix or beyond a row's entries; False without it."""
    library = _native.load()
    if library is None:
        return False
    return library.conversions("mask", shape, pointers, deltas=mask).first_bad_mask_row() is None


def mask_from_deltas(
    deltas: np.ndarray, values: np.ndarray, pointers: np.ndarray, shape: tuple[int, int], where: str
) -> np.ndarray:
    """The mask of a layer with index `"delta8"`.

    Raises:
        FormatError: if two entries of a row other than its end padding share a column, or the tail has deltas.
    """
    out_features, in_features = shape
    if deltas[int(pointers[-1]) :].any():
        raise FormatError(f"{where}: delta_indices must be zero past the last row's entries")
    mask = np.zeros((out_features, mask_row_bytes(in_features)), np.uint8)
    if (library := _native.load()) is not None:
        planes = library.conversions("delta8", shape, pointers, values=values, deltas=deltas)
        if planes.mask_from_deltas(mask) is None:
            return mask.reshape(-1)
    for first, last, rows, columns, _ in _columns_of_deltas(deltas, values, pointers, in_features, where):
        bits = np.zeros((last - first, mask.shape[1] * 8), bool)
        bits[rows - first, columns] = True
        mask[first:last] = np.packbits(bits, axis=1, bitorder="little")
    return mask.reshape(-1)


def deltas_from_mask(
    mask: np.ndarray, pointers: np.ndarray, shape: tuple[int, int], capacity: int, where: str
) -> np.ndarray:
    """The `delta_indices` plane that a mask came from.

    Raises:
        FormatError: if a row has more bits than entries, or lacks a filler in a gap of over 255 columns.
    """
    out_features, in_features = shape
    words = mask.reshape(out_features, mask_row_bytes(in_features))
    lengths = row_lengths(pointers)
    deltas = np.zeros(capacity, np.uint8)
    if (library := _native.load()) is not None:
        if library.conversions("mask", shape, pointers, deltas=mask).deltas_from_mask(deltas) is None:
            return deltas
        deltas[:] = 0
    for first, last in row_chunks(pointers, in_features):
        rows, columns = np.nonzero(np.unpackbits(words[first:last], axis=1, bitorder="little"))
        counts = np.bincount(rows, minlength=last - first)
        too_many = np.flatnonzero(counts > lengths[first:last])
        if too_many.size:
            raise FormatError(
                f"{where}: row {first + too_many[0]}: a row's mask has at most one bit an entry"
            )
        starts = np.cumsum(counts) - counts
        gaps = np.diff(columns, prepend=0)
        gaps[starts[counts > 0]] = columns[starts[counts > 0]]
        if (gaps > 255).any():
            row = first + int(rows[np.argmax(gaps > 255)])
            raise FormatError(
                f"{where}: row {row}: a gap of over 255 columns needs an entry of value 0 in it"
            )
        rank = np.arange(rows.size) - starts[rows]
        deltas[pointers[first:last].astype(np.int64)[rows] + rank] = gaps
    return deltas


def _columns_of_deltas(
    deltas: np.ndarray, values: np.ndarray, pointers: np.ndarray, in_features: int, where: str
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields `(first row, last row, rows, columns, entries)` of all entries but end padding, a chunk of rows a time.

    Raises:
        FormatError: if two of these entries share a column.
    """
    lengths = row_lengths(pointers)
    for first, last in row_chunks(pointers, in_features):
        begin, end = int(pointers[first]), int(pointers[last])
        rows = np.repeat(np.arange(first, last), lengths[first:last])
        delta, value = deltas[begin:end], values[begin:end]
        columns = np.cumsum(delta, dtype=np.int64)
        starts = np.minimum(pointers[first:last].astype(np.int64) - begin, max(end - begin - 1, 0))
        if columns.size:
            columns -= (columns[starts] - delta[starts])[rows - first]
        owned = np.flatnonzero((value != 0) | (delta != 0))
        ends = np.zeros(last - first, np.int64)
        ends[rows[owned] - first] = owned + 1  # the last of equal indices stays
        kept = np.flatnonzero(np.arange(begin, end) - begin < ends[rows - first])
        repeats = np.flatnonzero((delta[kept] == 0) & (kept != starts[rows[kept] - first]))
        if repeats.size:
            raise FormatError(
                f"{where}: row {rows[kept[repeats[0]]]}: each column must have one entry; two share column "
                f"{columns[kept[repeats[0]]]}; keep the layer in index 'delta8'"
            )
        yield first, last, rows[kept], columns[kept], kept + begin


def spread_dense(
    plane: np.ndarray,
    deltas: np.ndarray,
    values: np.ndarray,
    pointers: np.ndarray,
    shape: tuple[int, int],
    row_alignment: int,
    where: str,
) -> np.ndarray:
    """Moves a plane of entries with index `"delta8"` to rows of one entry a column, all others 0."""
    stride = dense_row_entries(shape[1], row_alignment)
    dense = np.zeros(shape[0] * stride, plane.dtype)
    for _, _, rows, columns, at in _columns_of_deltas(deltas, values, pointers, shape[1], where):
        dense[rows * stride + columns] = plane[at]
    return dense


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    step = max(_CHUNK_ENTRIES // max(rows.shape[1], 1), 1)
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]
