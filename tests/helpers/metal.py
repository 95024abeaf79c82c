"""Running the Metal kernels on NumPy arrays, with the grids that their files ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import pytest

import metal_ops
from helpers.layers import CASES

PRODUCTS = ("sparse_matvec", "sparse_matvec_shared", "sparse_matvec_simd", "sparse_matvec_batch")
KERNELS = tuple(sorted(path.stem for path in metal_ops._source.KERNELS.glob("*.metal")))
MANIFOLDS = ("unit", "prime")
DTYPES = ("float32", "float16", "bfloat16")

# The kernels take rows of deltas; masks and dense rows have kernels on CPUs only.
_CASES = [p for p in CASES if p.values[0].index == "delta8"]
each_case = pytest.mark.parametrize("case", _CASES)
each_float32_case = pytest.mark.parametrize("case", [p for p in _CASES if p.values[0].dtype == "float32"])


@functools.cache
def program(name: str, macros: tuple = (), **settings) -> metal_ops.Program:
    return metal_ops.Emulator(**settings).compile(source(name, macros))


@functools.cache
def source(name: str, macros: tuple = ()) -> metal_ops.Source:
    return metal_ops.load_source(name, dict(macros))


def aligned(array) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes, as XLA's buffers do."""
    array = np.asarray(array)
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclasses.dataclass(frozen=True)
class Planes:
    """A layer or a stack as NumPy arrays, each plane with a leading stack axis."""

    values: np.ndarray
    deltas: np.ndarray
    prime_indices: np.ndarray | None
    scales: np.ndarray
    row_pointers: np.ndarray
    shape: tuple[int, int]

    @property
    def manifold(self) -> str:
        return "unit" if self.prime_indices is None else "prime"

    @classmethod
    def of(cls, layer) -> Planes:
        names = ("values", "delta_indices", "prime_indices", "scales", "row_pointers")
        arrays = [getattr(layer, name) for name in names]
        arrays = [None if a is None else np.asarray(a) for a in arrays]
        if arrays[0].ndim == 1:
            arrays = [None if a is None else a[None] for a in arrays]
        return cls(*[None if a is None else aligned(a) for a in arrays], layer.shape)

    def buffers(self) -> dict[int, np.ndarray]:
        primes = self.values if self.prime_indices is None else self.prime_indices
        table = aligned(metal_ops.prime_table())
        return {1: self.values, 2: self.deltas, 3: table, 4: primes, 5: self.scales, 6: self.row_pointers}

    def parameters(self, **more) -> bytes:
        rows, columns = self.shape
        layers, capacity = self.values.shape
        return metal_ops.Parameters(
            rows=rows, columns=columns, capacity=capacity, layers=layers, **more
        ).pack()


def bits(x: np.ndarray) -> np.ndarray:
    """What a kernel reads: bfloat16 as uint16."""
    return aligned(x.view(np.uint16) if x.dtype.name == "bfloat16" else x)


def up(n: int, to: int) -> int:
    return -(-n // to)


def product(
    name: str,
    planes: Planes,
    x,
    index=None,
    bias=None,
    *,
    macros: Mapping = {},
    tile=None,
    simdgroups=2,
    **settings,
) -> np.ndarray:
    """`x (groups, vectors, columns)` -> float32 `(groups, vectors, rows)`, over poisoned memory."""
    groups, vectors, columns = x.shape
    rows = planes.shape[0]
    macros = tuple(sorted(macros.items()))
    constants = source(name, macros).constants
    tile = columns if tile is None else tile
    y = aligned(np.full((groups, vectors, rows), np.nan, np.float32))
    index = np.zeros(groups, np.int32) if index is None else np.asarray(index, np.int32)
    parameters = planes.parameters(vectors=vectors, groups=groups, has_bias=int(bias is not None), tile=tile)
    per_group = {
        "sparse_matvec": 32 * simdgroups,
        "sparse_matvec_batch": simdgroups,
    }.get(name) or simdgroups * constants["ROWS_PER_SIMDGROUP"]
    program(name, macros, **settings).dispatch(
        f"{name}_{planes.manifold}_{x.dtype.name}",
        {
            **planes.buffers(),
            0: bits(x),
            7: index,
            8: planes.scales if bias is None else aligned(bias),
            9: y,
            10: parameters,
        },
        threadgroups=(up(rows, per_group), up(vectors, constants.get("VECTORS_PER_PASS", 1)), groups),
        threads_per_threadgroup=(32 * simdgroups, 1, 1),
        threadgroup_memory={0: up(4 * tile, 16) * 16} if name == "sparse_matvec_shared" else {},
    )
    return y


def transposed(
    planes: Planes, g, index=None, *, parts=3, simdgroups=2, macros: Mapping = {}, **settings
) -> np.ndarray:
    """`g (groups, vectors, rows)` -> float32 `(groups, vectors, columns)`."""
    groups, vectors, _ = g.shape
    columns = planes.shape[1]
    sums = aligned(np.full((groups, vectors, parts, columns), np.nan, np.float32))
    index = np.zeros(groups, np.int32) if index is None else np.asarray(index, np.int32)
    parameters = planes.parameters(vectors=vectors, groups=groups, parts=parts)
    run = program("dense_sparse", tuple(sorted(macros.items())), **settings)
    run.dispatch(
        f"dense_sparse_{planes.manifold}_{g.dtype.name}",
        {**planes.buffers(), 0: bits(g), 7: index, 9: sums, 10: parameters},
        threadgroups=(up(parts, simdgroups), vectors, groups),
        threads_per_threadgroup=(32 * simdgroups, 1, 1),
    )
    if parts == 1:
        return sums[:, :, 0]
    y = aligned(np.full((groups, vectors, columns), np.nan, np.float32))
    run.dispatch(
        "dense_sparse_sum",
        {0: sums, 9: y, 10: parameters},
        threadgroups=(up(columns, 64), vectors, groups),
        threads_per_threadgroup=(64, 1, 1),
    )
    return y


def decode(planes: Planes, *, tile=None, simdgroups=2, macros: Mapping = {}, **settings) -> np.ndarray:
    """Every layer to dense: float32 `(layers, rows, columns)`."""
    rows, columns = planes.shape
    layers = planes.values.shape[0]
    tile = min(columns, 1024) if tile is None else tile
    dense = aligned(np.full((layers, rows, columns), np.nan, np.float32))
    program("mdcsr_decode", tuple(sorted(macros.items())), **settings).dispatch(
        f"mdcsr_decode_{planes.manifold}",
        {**planes.buffers(), 9: dense, 10: planes.parameters(tile=tile)},
        threadgroups=(up(rows, simdgroups), 1, layers),
        threads_per_threadgroup=(32 * simdgroups, 1, 1),
        threadgroup_memory={0: up(4 * tile * simdgroups, 16) * 16},
    )
    return dense
