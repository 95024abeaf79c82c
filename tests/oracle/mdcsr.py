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


def decode(values, deltas, scales, row_pointers, prime_indices, shape, index="delta8") -> np.ndarray:
    """Planes of one layer -> float32 (out, in)."""
    out = np.zeros(shape, np.float32)
    for row in range(shape[0]):
        entries = range(int(row_pointers[row]), int(row_pointers[row + 1]))
        for i, column in zip(entries, columns_of(row, deltas, row_pointers, shape, index), strict=False):
            level = int(values[i])
            if prime_indices is not None:
                level *= primes()[min(int(prime_indices[i]), 9_999)]
            if level and column < shape[1]:
                out[row, column] += np.float32(level)
    return out * np.asarray(scales, np.float32)[:, None]


def decode_layer(layer) -> np.ndarray:
    """An unstacked layer, or a stack, -> float32 ([S,] out, in)."""
    planes = [
        None if p is None else np.asarray(p)
        for p in (layer.values, layer.delta_indices, layer.scales, layer.row_pointers, layer.prime_indices)
    ]
    if planes[0].ndim == 1:
        return decode(*planes, layer.shape, layer.index)
    return np.stack(
        [
            decode(*[None if p is None else p[s] for p in planes], layer.shape, layer.index)
            for s in range(len(planes[0]))
        ]
    )
