"""A plain NumPy reading of docs/format.md, entry by entry; slow, obvious, and independent of the library."""

from __future__ import annotations

import functools

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


def decode(values, deltas, scales, row_pointers, prime_indices, shape) -> np.ndarray:
    """Planes of one layer -> float32 (out, in)."""
    out = np.zeros(shape, np.float32)
    for row in range(shape[0]):
        column = 0
        for i in range(int(row_pointers[row]), int(row_pointers[row + 1])):
            column += int(deltas[i])
            level = int(values[i])
            if prime_indices is not None:
                level *= primes()[min(int(prime_indices[i]), 9_999)]
            if level:
                out[row, column] += np.float32(level)
    return out * np.asarray(scales, np.float32)[:, None]


def decode_layer(layer) -> np.ndarray:
    """An unstacked layer, or a stack, -> float32 ([S,] out, in)."""
    planes = [
        None if p is None else np.asarray(p)
        for p in (layer.values, layer.delta_indices, layer.scales, layer.row_pointers, layer.prime_indices)
    ]
    if planes[0].ndim == 1:
        return decode(*planes, layer.shape)
    return np.stack(
        [decode(*[None if p is None else p[s] for p in planes], layer.shape) for s in range(len(planes[0]))]
    )
