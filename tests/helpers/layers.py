"""Matrices of awkward structure, and the cases that the transform tests run over."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import mdcsr as oracle

from upg_jax import MdCSR, stack

GAPS = (0, 1, 254, 255, 256, 257, 509, 510, 511, 765, 766, 70_000)


def matrix(structure: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A float32 matrix; magnitudes stay within [0.25, 1.25], so that no stored weight rounds to 0."""
    w = (rng.uniform(0.25, 1.25, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    rows, columns = np.indices(shape)
    keep = {
        "random": lambda: rng.random(shape) < 0.5,
        "full": lambda: np.ones(shape, bool),
        "empty_rows": lambda: (rows % 3 == 1) & (rng.random(shape) < 0.5),
        "full_row": lambda: (rows == shape[0] // 2) | (rng.random(shape) < 0.05),
        "last_column": lambda: columns == shape[1] - 1,
        "zero": lambda: np.zeros(shape, bool),
    }[structure]()
    return np.where(keep, w, np.float32(0))


def gaps_matrix() -> np.ndarray:
    """A row per gap: a weight at that column, and a second as far again where that fits; the last is full."""
    w = np.zeros((len(GAPS) + 2, GAPS[-1] + 131), np.float32)
    for row, gap in enumerate(GAPS):
        w[row, gap] = 1 + row
        if gap > 0 and 2 * gap < w.shape[1]:
            w[row, 2 * gap] = -0.5 - row
    w[len(GAPS), -1] = 3
    w[len(GAPS) + 1] = 0.25
    return w


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer by its description, so that pytest can name it."""

    structure: str = "random"
    shape: tuple[int, int] = (33, 67)
    manifold: str = "unit"
    dtype: str = "float32"
    row_alignment: int = 1
    seed: int = 0
    index: str = "delta8"
    value_bits: int = 8

    def __post_init__(self):
        _layer(self)  # at once, since arrays made while tracing would be tracers

    def __str__(self) -> str:
        rows, columns = self.shape
        name = f"{self.structure}-{rows}x{columns}-{self.manifold}-{self.dtype}-align{self.row_alignment}"
        name = name if self.index == "delta8" else f"{name}-{self.index}"
        return name if self.value_bits == 8 else f"{name}-{self.value_bits}bits"

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self}-{self.seed}".encode()))

    @property
    def layer(self) -> MdCSR:
        return _layer(self)

    @property
    def levels(self) -> np.ndarray:
        """The oracle's `q` or `q * P[k]`, exact in float64."""
        return _levels(self)

    @property
    def scales(self) -> np.ndarray:
        return np.asarray(self.layer.scales)

    @property
    def weight(self) -> np.ndarray:
        """The matrix in float64, before the one rounding of a decoded weight."""
        return self.levels * self.scales.astype(np.float64)[:, None]

    @property
    def terms(self) -> int:
        """The longest chain of additions in any product or gradient with up to 16 vectors, plus 2."""
        stored = np.diff(np.asarray(self.layer.row_pointers).astype(np.int64)).max(initial=0)
        return int(max(stored, self.shape[0]) + 16 + 2)

    def x(self, *lead: int, salt: int = 0) -> jnp.ndarray:
        return self._vectors((*lead, self.shape[1]), salt)

    def cotangent(self, *lead: int, salt: int = 0) -> jnp.ndarray:
        return self._vectors((*lead, self.shape[0]), salt + 1000)

    def _vectors(self, shape: tuple[int, ...], salt: int) -> jnp.ndarray:
        rng = np.random.default_rng((self.seed, salt, *shape))
        return jax.device_put(rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(self.dtype)))


@functools.cache
def _layer(case: Case) -> MdCSR:
    w = matrix(case.structure, case.shape, case.rng).astype(jnp.dtype(case.dtype))
    return MdCSR.from_dense(
        w,
        manifold=case.manifold,
        row_alignment=case.row_alignment,
        index=case.index,
        value_bits=case.value_bits,
        group_size=None if case.value_bits == 8 else 32,
    )


@functools.cache
def _levels(case: Case) -> np.ndarray:
    scaleless = dataclasses.replace(case.layer, scales=np.ones(case.shape[0], np.float32))
    return oracle.decode_layer(scaleless).astype(np.float64)


@functools.cache
def stacked(*cases: Case) -> MdCSR:
    """The cases' layers as one stack; stacked on the host, which compiles nothing."""
    return jax.device_put(stack([jax.tree.map(np.asarray, case.layer) for case in cases]))


_SHAPES = [
    *(("random", shape) for shape in ((0, 5), (1, 1), (1, 3), (3, 1), (33, 67), (67, 33), (101, 7))),
    *((structure, (33, 67)) for structure in ("full", "empty_rows", "full_row", "last_column", "zero")),
]
_QUICK = {
    "random-33x67-unit-float32-align8",
    "empty_rows-33x67-prime-float32-align1",
    "random-67x33-prime-bfloat16-align1",
    "zero-33x67-unit-float16-align8",
}


MASK_CASE = Case("empty_rows", (33, 67), "prime", "float32", 8, index="mask")
DENSE_CASE = Case("random", (33, 67), "unit", "float32", 8, index="dense")
NARROW_CASES = (
    Case("empty_rows", (33, 67), "unit", "float32", 2, index="mask", value_bits=4),
    Case("random", (33, 67), "unit", "float32", 8, index="dense", value_bits=3),
)


def _cases() -> list:
    params = []
    product = itertools.product(("unit", "prime"), ("float32", "bfloat16", "float16"), enumerate(_SHAPES))
    for manifold, dtype, (i, (structure, shape)) in product:
        # Alternates so that every structure meets both alignments, without doubling the product.
        alignment = 8 if (i + (manifold == "prime") + (dtype == "float32")) % 2 else 1
        case = Case(structure, shape, manifold, dtype, alignment)
        quick = str(case) in _QUICK
        params.append(pytest.param(case, id=str(case), marks=[] if quick else [pytest.mark.slow]))
    params += [pytest.param(case, id=str(case)) for case in (MASK_CASE, DENSE_CASE, *NARROW_CASES)]
    assert {p.id for p in params} >= _QUICK, "a quick case names none of the product"
    return params


# dtype x manifold x structure and shape x alignment: a few in every run, all of them under -m slow.
CASES = _cases()
each_case = pytest.mark.parametrize("case", CASES)
each_float32_case = pytest.mark.parametrize("case", [p for p in CASES if p.values[0].dtype == "float32"])
