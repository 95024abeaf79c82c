"""Random planes, and what docs/format.md says they mean."""

from __future__ import annotations

import dataclasses

import numpy as np

import metal_ops

PRIMES = metal_ops.prime_table().astype(np.int64) + 65536 * (np.arange(10_000) >= 6542)


@dataclasses.dataclass
class Layers:
    """A stack in NumPy, as docs/format.md has it."""

    values: np.ndarray
    deltas: np.ndarray
    primes: np.ndarray | None
    scales: np.ndarray
    row_pointers: np.ndarray
    shape: tuple[int, int]

    @property
    def manifold(self) -> str:
        return "unit" if self.primes is None else "prime"

    @property
    def bytes_read(self) -> int:
        """Of one layer's planes, in a product."""
        planes = [self.values, self.deltas, self.scales, self.row_pointers]
        return sum(p.nbytes for p in [*planes, *([] if self.primes is None else [self.primes])]) // len(
            self.values
        )

    def row(self, layer: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and levels of what lies inside the matrix."""
        capacity = self.values.shape[1]
        begin, end = (min(int(p), capacity) for p in self.row_pointers[layer, row : row + 2])
        columns = np.cumsum(self.deltas[layer, begin:end], dtype=np.int64)
        inside = columns < self.shape[1]
        levels = self.values[layer, begin:end].astype(np.int64)
        if self.primes is not None:
            levels = levels * PRIMES[np.minimum(self.primes[layer, begin:end], 9_999)]
        return columns[inside], levels[inside].astype(np.float64)


def valid(
    shape: tuple[int, int], density: float, manifold: str, layers: int, alignment: int, seed: int
) -> Layers:
    """Random valid layers, all with the same planes but for the values."""
    rows, columns = shape
    rng = np.random.default_rng(seed)
    deltas, lengths = [], []
    for _ in range(rows):
        keep = rng.random(columns, np.float32) < density
        keep[::255] = True  # so that no gap needs a filler
        found = np.diff(np.flatnonzero(keep), prepend=0).astype(np.uint8)
        found = np.pad(found, (0, -len(found) % alignment))
        deltas.append(found)
        lengths.append(len(found))
    flat = np.concatenate(deltas)
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    values = rng.integers(-127, 128, (layers, flat.size), np.int8)
    values[:, (flat == 0)] = 0
    return Layers(
        values=values,
        deltas=np.broadcast_to(flat, values.shape),
        primes=rng.integers(0, 10_000, values.shape, np.uint16) if manifold == "prime" else None,
        scales=rng.uniform(0.5, 2, (layers, rows)).astype(np.float32)
        / (1 if manifold == "unit" else 100_000),
        row_pointers=np.broadcast_to(pointers, (layers, rows + 1)),
        shape=shape,
    )


def garbage(shape: tuple[int, int], manifold: str, layers: int, capacity: int, seed: int) -> Layers:
    """Planes of any content."""
    rng = np.random.default_rng(seed)
    size, rows = (layers, capacity), (layers, shape[0] + 1)
    return Layers(
        values=rng.integers(-128, 128, size, np.int8),
        deltas=rng.integers(0, 256 if seed % 2 else 4, size, np.uint8),
        primes=rng.integers(0, 2**16, size, np.uint16) if manifold == "prime" else None,
        scales=rng.uniform(0.5, 2, (layers, shape[0])).astype(np.float32),
        row_pointers=np.where(
            rng.random(rows) < 0.2, rng.integers(0, 2**32, rows), rng.integers(0, capacity, rows)
        ).astype(np.uint32),
        shape=shape,
    )
