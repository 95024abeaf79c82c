"""The products in the emulator, against the plain NumPy oracle, within the design's bound."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import metal
from helpers.bounds import assert_within_bound
from helpers.layers import Case, gaps_matrix
from helpers.metal import Planes, each_case
from oracle import mdcsr as oracle

from upg_jax import MdCSR

# Some parts hold rows, one holds none.
PARTS = (1, 3, 40)


def vectors(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(jnp.dtype(dtype))


def check_product(y: np.ndarray, x: np.ndarray, levels: np.ndarray, scales: np.ndarray, terms: int) -> None:
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, levels, scales, terms=terms, dtype="float32")


def check_transposed(
    y: np.ndarray, g: np.ndarray, levels: np.ndarray, scales: np.ndarray, terms: int
) -> None:
    assert_within_bound(y, lambda g, w, s: g * s @ w, g, levels, scales, terms=terms, dtype="float32")


@each_case
@pytest.mark.parametrize("kernel", metal.PRODUCTS)
def test_products_of_every_structure(kernel, case):
    x = vectors((1, 5, case.shape[1]), case.dtype)
    # A tile of 48 columns cuts rows and chunks.
    y = metal.product(kernel, Planes.of(case.layer), x, tile=48)
    check_product(y[0], x[0], case.levels, case.scales, case.terms)


@each_case
@pytest.mark.parametrize("parts", PARTS)
def test_transposed_products_of_every_structure(parts, case):
    g = vectors((1, 3, case.shape[0]), case.dtype)
    y = metal.transposed(Planes.of(case.layer), g, parts=parts)
    check_transposed(y[0], g[0], case.levels, case.scales, case.terms + parts)


@pytest.mark.parametrize("dtype", metal.DTYPES)
@pytest.mark.parametrize("manifold", metal.MANIFOLDS)
@pytest.mark.parametrize("alignment", [1, 4, 8, 16])
def test_rows_of_several_chunks_of_every_alignment(alignment, manifold, dtype):
    case = Case("random", (7, 1999), manifold, dtype, alignment)
    x, g = vectors((1, 5, 1999), dtype), vectors((1, 2, 7), dtype)
    planes = Planes.of(case.layer)
    for kernel in metal.PRODUCTS:
        check_product(
            metal.product(kernel, planes, x, tile=700)[0], x[0], case.levels, case.scales, case.terms
        )
    check_transposed(metal.transposed(planes, g)[0], g[0], case.levels, case.scales, case.terms)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9])
def test_every_number_of_vectors(n):
    case = Case("random", (33, 67), "unit")
    planes = Planes.of(case.layer)
    x, g = vectors((1, n, 67), "float32", n), vectors((1, n, 33), "float32", n)
    for kernel in metal.PRODUCTS:
        check_product(metal.product(kernel, planes, x)[0], x[0], case.levels, case.scales, case.terms)
    check_transposed(metal.transposed(planes, g)[0], g[0], case.levels, case.scales, case.terms + 3)


@functools.cache
def gaps(manifold: str, alignment: int) -> tuple[Planes, np.ndarray]:
    layer = MdCSR.from_dense(gaps_matrix(), manifold=manifold, row_alignment=alignment)
    scaleless = dataclasses.replace(layer, scales=np.ones(layer.shape[0], np.float32))
    return Planes.of(layer), oracle.decode_layer(scaleless).astype(np.float64)


@pytest.mark.parametrize(("manifold", "alignment"), [("unit", 1), ("prime", 16)])
def test_gaps_of_every_length_and_a_full_row(manifold, alignment):
    planes, levels = gaps(manifold, alignment)
    rows, columns = planes.shape
    x, g = vectors((1, 2, columns), "float32"), vectors((1, 1, rows), "float32")
    for kernel in metal.PRODUCTS:
        y = metal.product(kernel, planes, x, tile=8192)
        check_product(y[0], x[0], levels, planes.scales[0], columns + 2)
    check_transposed(metal.transposed(planes, g)[0], g[0], levels, planes.scales[0], rows + 5)
    np.testing.assert_array_equal(
        metal.decode(planes, tile=4096)[0], levels.astype(np.float32) * planes.scales[0][:, None]
    )


@pytest.mark.parametrize("kernel", metal.PRODUCTS)
def test_bias_is_added_after_scaling(kernel):
    case = Case("random", (33, 67), "prime")
    x, bias = vectors((1, 3, 67), "float32"), vectors((33,), "float32", 1)
    y = metal.product(kernel, Planes.of(case.layer), x, bias=bias)
    assert_within_bound(
        y[0], lambda x, w, s, b: x @ w.T * s + b, x[0], case.levels, case.scales, bias, terms=case.terms + 1
    )


def test_subnormal_and_largest_half_precision_numbers_keep_their_value():
    layer = MdCSR.from_dense(np.eye(9, dtype=np.float32))
    planes = dataclasses.replace(Planes.of(layer), scales=np.full((1, 9), 1 / 127, np.float32))
    x = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, -65504, 1, -1], np.float16)
    levels = np.eye(9) * 127
    for kernel in metal.PRODUCTS:
        y = metal.product(kernel, planes, x[None, None])
        check_product(y[0], x[None], levels, planes.scales[0], 3)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [4, 16])
def test_other_numbers_of_entries_per_lane(entries):
    macros = {"LANE_ENTRIES": entries}
    for manifold, alignment in (("unit", 1), ("prime", 1), ("unit", 16), ("prime", 16)):
        case = Case("random", (13, 1999), manifold, "float32", alignment)
        planes = Planes.of(case.layer)
        x, g = vectors((1, 5, 1999), "float32"), vectors((1, 2, 13), "float32")
        for kernel in metal.PRODUCTS[1:]:
            y = metal.product(kernel, planes, x, tile=700, macros=macros)
            check_product(y[0], x[0], case.levels, case.scales, case.terms)
        y = metal.transposed(planes, g, macros=macros)
        check_transposed(y[0], g[0], case.levels, case.scales, case.terms)
        np.testing.assert_array_equal(metal.decode(planes, macros=macros), metal.decode(planes))


@pytest.mark.slow
def test_other_numbers_of_rows_and_vectors():
    case = Case("random", (33, 67), "prime", "float32", 4)
    planes, x = Planes.of(case.layer), vectors((1, 7, 67), "float32")
    for kernel, macro, n in (
        ("sparse_matvec_simd", "ROWS_PER_SIMDGROUP", 3),
        ("sparse_matvec_shared", "ROWS_PER_SIMDGROUP", 1),
        ("sparse_matvec_batch", "VECTORS_PER_PASS", 3),
    ):
        y = metal.product(kernel, planes, x, macros={macro: n})
        check_product(y[0], x[0], case.levels, case.scales, case.terms)
