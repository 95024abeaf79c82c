"""Cutting a layer into blocks of its rows or columns, and joining them again; on the host, a block at a time.

A *cut* says for each block which features it has, in order, as runs `(first, count)`; `first` is `PADDING` for features
that the matrix does not have: rows without weights, columns without entries. Blocks are of equal length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from upg_jax._entries import assemble, encode_chunk, encode_entries
from upg_jax._index import dense_row_entries, index_bytes, mask_row_bytes, row_chunks, row_lengths
from upg_jax._mdcsr import MdCSR
from upg_jax._values import a_byte_each, groups_of, value_bytes

Run: TypeAlias = tuple[int, int]
Cut: TypeAlias = tuple[tuple[Run, ...], ...]
Piece: TypeAlias = tuple[Any, int, int]
"""A run of rows or columns: an `MdCSR` with NumPy planes, the first and how many; None in its place for padding."""

PADDING = -1


def even_cut(size: int, blocks: int, multiple: int = 1) -> Cut:
    """Consecutive features in blocks of equal length, of which the last are padded where they do not divide.

    Args:
        size: features.
        blocks: how many.
        multiple: what the length of a block must be a multiple of.
    """
    length = -(-size // (blocks * multiple)) * multiple
    counts = [min(max(size - i * length, 0), length) for i in range(blocks)]
    runs = [((i * length, count), (PADDING, length - count)) for i, count in enumerate(counts)]
    return tuple(tuple(run for run in block if run[1]) for block in runs)


def block_length(cut: Cut) -> int:
    """Features of each block, padding included."""
    return sum(count for _, count in cut[0])


def sources(cut: Cut) -> np.ndarray:
    """The feature in each place of the blocks side by side, int64; `PADDING` where there is none."""
    runs = [run for block in cut for run in block]
    parts = [np.full(n, PADDING) if first == PADDING else np.arange(first, first + n) for first, n in runs]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def places(cut: Cut) -> np.ndarray:
    """The reverse: the first place of each feature in the blocks side by side, int64."""
    features, first = np.unique(sources(cut), return_index=True)
    return first[features != PADDING]


def pieces_of(layer: MdCSR, runs: Sequence[Run]) -> list[Piece]:
    """A block's runs, of a layer."""
    return [(None if first == PADDING else layer, first, count) for first, count in runs]


def pieces_in_order(blocks: Sequence[MdCSR], cut: Cut) -> list[Piece]:
    """The runs of blocks that make up the whole again."""
    found: dict[int, Piece] = {}
    for block, runs in zip(blocks, cut, strict=True):
        at = 0
        for first, count in runs:
            if first != PADDING:
                found.setdefault(first, (block, at, count))
            at += count
    return [found[first] for first in sorted(found)]


def block_capacity(layer: MdCSR, cut: Cut, dim: str) -> int:
    """Entries of the largest block of one layer."""
    if dim == "in":
        return max(_entries_by_column_block(a_byte_each(layer), cut), default=0)
    pointers, padding = layer.row_pointers, _padding_entries(layer)
    sizes = [
        sum(n * padding if i == PADDING else int(pointers[i + n]) - int(pointers[i]) for i, n in runs)
        for runs in cut
    ]
    return max(sizes)


def take_rows(pieces: Sequence[Piece], like: MdCSR, capacity: int | None = None) -> MdCSR:
    """Joins runs of rows, bit for bit.

    Args:
        pieces: rows in order, of layers that differ in nothing but rows.
        like: one of the layers.
        capacity: of the result; by default as much as the rows need.
    """
    shape = (sum(count for _, _, count in pieces), like.in_features)
    padding = _padding_entries(like)
    lengths = [
        np.full(n, padding) if layer is None else row_lengths(layer.row_pointers[i : i + n + 1])
        for layer, i, n in pieces
    ]
    pointers = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    capacity = int(pointers[-1]) if capacity is None else capacity

    def join(plane: str, offset: Callable[[Any, int], int], padding: int, length: int) -> np.ndarray:
        joined = np.zeros(length, getattr(like, plane).dtype)
        at = 0
        for layer, first, count in pieces:
            if layer is None:
                at += count * padding
                continue
            part = getattr(layer, plane)[offset(layer, first) : offset(layer, first + count)]
            joined[at : at + part.size] = part
            at += part.size
        return joined

    def entries(plane: str, bits: int = 8) -> np.ndarray:
        return join(
            plane,
            lambda layer, row: value_bytes(int(layer.row_pointers[row]), bits),
            value_bytes(padding, bits),
            value_bytes(capacity, bits),
        )

    def of_rows(plane: str, each: int) -> np.ndarray:
        return join(plane, lambda layer, row: row * each, each, shape[0] * each)

    mask_bytes = mask_row_bytes(shape[1])
    groups = groups_of(shape[1], like.group_size)
    columns: dict[str, Callable[[], np.ndarray]] = {
        "delta8": lambda: entries("delta_indices"),
        "mask": lambda: of_rows("delta_indices", mask_bytes),
        "dense": lambda: np.zeros(index_bytes("dense", shape, capacity), np.uint8),
    }
    return dataclasses.replace(
        like,
        shape=shape,
        values=entries("values", like.value_bits),
        delta_indices=columns[like.index](),
        prime_indices=None if like.prime_indices is None else entries("prime_indices"),
        scales=of_rows("scales", 1),
        # Of rows that are padding, too, multipliers are valid.
        group_scales=np.maximum(of_rows("group_scales", groups), 1) if groups else like.group_scales,
        row_pointers=pointers.astype(np.uint32),
    )


def _padding_entries(layer: MdCSR) -> int:
    """Entries that a row without weights has."""
    return dense_row_entries(layer.in_features, layer.row_alignment) if layer.index == "dense" else 0


def take_columns(pieces: Sequence[Piece], like: MdCSR, capacity: int | None = None) -> MdCSR:
    """Joins runs of columns: the same weights, encoded anew, since gaps are others.

    Args:
        pieces: columns in order, of layers that differ in nothing but columns.
        like: one of the layers.
        capacity: of the result; by default as much as the entries need.
    """
    shape = (like.out_features, sum(count for _, _, count in pieces))
    starts = np.cumsum([0, *(count for _, _, count in pieces)])
    group_scales = _multipliers_of_columns(pieces, starts, like)
    pieces = [(layer and a_byte_each(layer), column, count) for layer, column, count in pieces]
    layers = [layer for layer, _, _ in pieces if layer is not None]
    owned = sum((layer.row_pointers.astype(np.int64) for layer in layers), np.zeros(shape[0] + 1, np.int64))
    nothing = np.zeros(0, np.int64)
    chunks = []
    for first, last in row_chunks(owned, shape[1]):
        found = [(nothing, nothing, *_levels(a_byte_each(like), nothing))]
        for (layer, column, count), start in zip(pieces, starts, strict=False):
            if layer is None:
                continue
            rows, columns, at = _weights_of_rows(layer, first, last)
            kept = (columns >= column) & (columns < column + count)
            rows, columns, at = rows[kept], columns[kept] - column + start, at[kept]
            found.append((rows, columns, *_levels(layer, at)))
        entries = tuple(np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(entries[0], kind="stable")
        entries = tuple(part[order] for part in entries)
        size = (last - first, shape[1])
        chunks.append(encode_chunk(entries, size, like.row_alignment, like.index, like.value_bits))
    return assemble(
        chunks,
        np.array(like.scales),
        shape=shape,
        manifold=like.manifold,
        row_alignment=like.row_alignment,
        dtype=like.dtype,
        capacity=capacity,
        index=like.index,
        value_bits=like.value_bits,
        group_size=like.group_size,
        group_scales=group_scales,
    )


def check_groups(cut: Cut, group_size: int | None) -> None:
    """Checks that a cut of columns leaves groups of columns whole.

    Raises:
        ValueError: if it does not.
    """
    if group_size is None:
        return
    for runs in cut:
        starts = np.cumsum([0, *(count for _, count in runs)])
        for (first, _), start in zip(runs, starts.tolist(), strict=False):
            if first != PADDING and (first % group_size or start % group_size):
                raise ValueError(
                    f"shard: columns must be cut between groups of {group_size}, which share a multiplier; a device "
                    f"would begin with column {first} of them; use another number of devices, or compress with a "
                    "smaller group size"
                )


def _multipliers_of_columns(pieces: Sequence[Piece], starts: np.ndarray, like: MdCSR) -> np.ndarray | None:
    """`group_scales (rows, groups)` of runs of columns that begin with whole groups; 1 for padding."""
    if like.group_size is None:
        return None
    size = like.group_size
    joined = np.ones((like.out_features, groups_of(int(starts[-1]), size)), np.uint8)
    for (layer, column, count), start in zip(pieces, (starts // size).tolist(), strict=False):
        if layer is not None and count:
            multipliers = layer.group_scales.reshape(-1, groups_of(layer.in_features, size))
            joined[:, start : start + groups_of(count, size)] = multipliers[:, column // size :][
                :, : groups_of(count, size)
            ]
    return joined


def _levels(layer: Any, at: np.ndarray) -> list[np.ndarray]:
    planes = [layer.values] if layer.prime_indices is None else [layer.values, layer.prime_indices]
    return [plane[at] for plane in planes]


def _entries_by_column_block(layer: Any, cut: Cut) -> list[int]:
    """Entries that each block of columns needs; columns are in order."""
    length, rows = block_length(cut), layer.out_features
    if layer.index == "dense":
        return [rows * dense_row_entries(length, layer.row_alignment)]
    place = places(cut)
    total = np.zeros(len(cut), np.int64)
    for first, last in row_chunks(layer.row_pointers, layer.in_features):
        row, column, at = _weights_of_rows(layer, first, last)
        # A row of a block is a row of its own here, so that one pass serves all blocks.
        block, column = np.divmod(place[column], max(length, 1))
        encoded = encode_entries(
            row * len(cut) + block,
            column,
            layer.values[at],
            num_rows=(last - first) * len(cut),
            row_alignment=layer.row_alignment,
        )
        total += encoded.row_lengths.reshape(-1, len(cut)).sum(axis=0)
    return total.tolist()


def _weights_of_rows(layer: Any, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row from `first` on, column and place in the planes of every entry that is not 0."""
    pointers = layer.row_pointers[first : last + 1].astype(np.int64)
    begin, end = int(pointers[0]), int(pointers[-1])
    lengths = np.diff(pointers)
    if layer.index == "delta8":
        rows = np.repeat(np.arange(last - first), lengths)
        ends = np.concatenate([[0], np.cumsum(layer.delta_indices[begin:end], dtype=np.int64)])
        columns, at = ends[1:] - ends[pointers[:-1] - begin][rows], np.arange(begin, end)
    elif layer.index == "mask":
        bits = layer.delta_indices.reshape(layer.out_features, -1)[first:last]
        rows, columns = np.nonzero(np.unpackbits(bits, axis=1, bitorder="little"))
        counts = np.bincount(rows, minlength=last - first)
        at = pointers[rows] + np.arange(rows.size) - (np.cumsum(counts) - counts)[rows]
    else:
        at = (pointers[:-1, None] + np.arange(layer.in_features)).reshape(-1)
        rows, columns = np.divmod(np.arange(at.size), max(layer.in_features, 1))
    kept = np.flatnonzero(layer.values[at])
    return rows[kept], columns[kept], at[kept]
