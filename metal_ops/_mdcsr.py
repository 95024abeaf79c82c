"""What the kernels of this package share: their parameters and the prime table (docs/format.md)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_LARGEST_CHUNK = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """The `constant` struct at buffer index 10 of every kernel (`kernels/mdcsr.h`): whole numbers below 2**32.

    So are the elements of `x`, `groups * vectors * columns` (more groups take several dispatches), and the rows of all
    layers.

    Attributes:
        rows: of the matrix (features out).
        columns: of the matrix (features in).
        capacity: length of the planes of one layer.
        layers: layers in the stack; 1 for a single layer.
        vectors: vectors of each group.
        groups: groups of vectors, each with its layer of the stack.
        tile: floats of threadgroup memory for each threadgroup (`sparse_matvec_shared`) or simdgroup (`mdcsr_decode`);
            columns of a tile (`sparse_matvec_stream`).
        parts: parts that `dense_sparse` cuts the rows into, and `sparse_matvec_stream` the columns.
        has_bias: 1 where the bias is added.
    """

    rows: int
    columns: int
    capacity: int
    layers: int = 1
    vectors: int = 1
    groups: int = 1
    tile: int = 0
    parts: int = 1
    has_bias: int = 0

    def __post_init__(self) -> None:
        numbers = dataclasses.asdict(self)
        numbers["elements of x"] = self.groups * self.vectors * self.columns
        numbers["rows of all layers"] = self.layers * self.rows
        # Kernels count entries by chunks, beyond a row's end.
        numbers["capacity and a chunk"] = self.capacity + _LARGEST_CHUNK
        for name, number in numbers.items():
            if not 0 <= number < 2**32:
                raise ValueError(f"Parameters: {name} must be at least 0 and below 2**32; got {number}")

    def pack(self) -> bytes:
        """The struct's bytes, for `setBytes` or a `dispatch`."""
        return np.array(dataclasses.astuple(self), np.uint32).tobytes()


@functools.cache
def prime_table() -> np.ndarray:
    """The first 10,000 primes as the kernels take them: uint16 `(10000,)`, the low 16 bits of each.

    Primes from index 6542 on have bit 16 set, which the kernels add. So the table takes 20 KB instead of 40.
    """
    sieve = np.ones(104_730, bool)
    sieve[:2] = False
    for factor in range(2, 324):
        if sieve[factor]:
            sieve[factor * factor :: factor] = False
    table = (np.flatnonzero(sieve) & 0xFFFF).astype(np.uint16)
    table.flags.writeable = False
    return table
