"""A plain NumPy reading of docs/format.md, entry by entry; slow, obvious, and independent of the library."""

from __future__ import annotations

import functools
import itertools

import numpy as np


@functools.cache
def primes() -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < 10_000:
        if all(candidate % p for p in found if p * p <= candidate):
            found.append(candidate)
        candidate += 1
    return found


def columns_of(row, deltas, row_pointers, shape, index) -> list[int]:
    """The columns of a row's entries; entries past the end of the list have none."""
    begin, end = int(row_pointers[row]), int(row_pointers[row + 1])
    if index == "dense":
        return list(range(end - begin))
    if index == "delta8":
        return list(itertools.accumulate(int(delta) for delta in deltas[begin:end]))
    row_bytes = 8 * ((shape[1] + 63) // 64)
    bits = int.from_bytes(bytes(deltas[row * row_bytes : (row + 1) * row_bytes]), "little")
    return [column for column in range(8 * row_bytes) if bits >> column & 1]


def values_of(values, bits) -> list[int]:
    """The values in a plane: a little-endian stream of two's complement integers of so many bits."""
    raw = np.asarray(values).tobytes()
    found = []
    for first in range(0, 8 * len(raw) // bits * bits, bits):
        value = int.from_bytes(raw[first // 8 : first // 8 + 2], "little") >> first % 8 & (1 << bits) - 1
        found.append(value - (1 << bits) if value >= 1 << (bits - 1) else value)
    return found


def decode(
    values,
    deltas,
    scales,
    row_pointers,
    prime_indices,
    shape,
    index="delta8",
    value_bits=8,
    group_size=None,
    group_scales=None,
) -> np.ndarray:
    """Planes of one layer -> float32 (out, in)."""
    out = np.zeros(shape, np.float32)
    if value_bits != 8:
        values = values_of(values, value_bits)
    for row in range(shape[0]):
        entries = range(int(row_pointers[row]), int(row_pointers[row + 1]))
        for i, column in zip(entries, columns_of(row, deltas, row_pointers, shape, index), strict=False):
            level = int(values[i])
            if prime_indices is not None:
                level *= primes()[min(int(prime_indices[i]), 9_999)]
            if level and column < shape[1]:
                if group_size is not None:
                    groups = (shape[1] + group_size - 1) // group_size
                    level *= int(group_scales[row * groups + column // group_size])
                out[row, column] += np.float32(level)
    return out * np.asarray(scales, np.float32)[:, None]


def decode_layer(layer) -> np.ndarray:
    """An unstacked layer, or a stack, -> float32 ([S,] out, in)."""
    planes = [
        None if p is None else np.asarray(p)
        for p in (layer.values, layer.delta_indices, layer.scales, layer.row_pointers, layer.prime_indices)
    ]
    multipliers = None if layer.group_scales is None else np.asarray(layer.group_scales)

    def one(planes, multipliers):
        statics = (layer.shape, layer.index, layer.value_bits, layer.group_size)
        return decode(*planes, *statics, multipliers)

    if planes[0].ndim == 1:
        return one(planes, multipliers)
    return np.stack(
        [
            one(
                [None if p is None else p[s] for p in planes], None if multipliers is None else multipliers[s]
            )
            for s in range(len(planes[0]))
        ]
    )
