"""Both products, for every instruction set: sizes around every boundary of the kernels, against float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound, exact
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, sparse_dense, stack

# Below and above every change of algorithm: single vectors (3; 8 of whole rows), units of 16, slabs of 64, 32 at once.
COUNTS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 48, 64, 65, 129)
# Rows of up to 7, 8 and 16 entries, more than a window of 64 columns, more than a block.
SHAPES = ((1, 1), (3, 7), (7, 3), (33, 67), (40, 513))


INDEXES = ("delta8", "mask", "dense")


def layer_of(shape, density, manifold, *, row_alignment=1, seed=0, index="delta8") -> MdCSR:
    rng = np.random.default_rng((seed, *shape))
    w = rng.standard_normal(shape).astype(np.float32)
    w[1::5] = 0  # empty rows
    mask = rng.random(shape) < density
    mask[2::5] = True  # full rows
    return MdCSR.from_dense(w, mask=mask, manifold=manifold, row_alignment=row_alignment, index=index)


@jax.jit
def both(x, g, layer):
    y, vjp = jax.vjp(lambda x: sparse_dense(x, layer), x)
    return y, vjp(g.astype(y.dtype))[0]


def multiply(x, g, layer):
    """Both products, fetched: the instruction set is chosen when a program runs, so that all sets share programs."""
    return jax.tree.map(np.asarray, both(x, g, layer))


def check(layer, x, g, dtype="float32"):
    levels = decode_layer(dataclasses.replace(layer, scales=np.ones_like(layer.scales)))
    terms = (
        max(np.diff(np.asarray(layer.row_pointers).astype(np.int64)).max(initial=0), layer.out_features) + 12
    )
    y, gx = multiply(x, g, layer)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, levels, layer.scales, terms=terms, dtype=dtype)
    rounded = exact(g.astype(dtype))
    assert_within_bound(
        gx, lambda g, w, s: g * s @ w, rounded, levels, layer.scales, terms=terms, dtype=dtype
    )


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_every_density_are_within_the_bound(shape, manifold, index, kernels):
    rng = np.random.default_rng(1)
    # 0.25 and 0.6 take windows of 128 and 64 columns on AVX-512.
    for i, density in enumerate((0.02, 0.25, 0.6, 1.0)):
        layer = layer_of(shape, density, manifold, row_alignment=8 if i % 2 else 1, seed=i, index=index)
        counts = (COUNTS[i], COUNTS[-1 - i])
        # Small matrices meet few vectors and many in turn.
        for n in counts if min(shape) > 7 else counts[i % 2 :: 2]:
            x = jax.device_put(rng.standard_normal((n, shape[1])).astype(np.float32))
            g = jax.device_put(rng.standard_normal((n, shape[0])).astype(np.float32))
            check(layer, x, g)


@pytest.mark.parametrize("index", ["mask", "dense"])
@pytest.mark.parametrize("n", range(1, 9))
def test_rows_whose_sums_exceed_a_core_s_cache_are_within_the_bound(n, index, kernels):
    """Transposed, whole rows are walked in pieces of columns, each over tiles of 16 rows."""
    layer = layer_of((37, 5300), 0.3, "unit", index=index)
    rng = np.random.default_rng(n)
    check(layer, *(jnp.asarray(rng.standard_normal((n, size)), jnp.float32) for size in (5300, 37)))


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("n", COUNTS)
def test_every_number_of_vectors(n, index, kernels):
    rng = np.random.default_rng(n)
    layer = layer_of((33, 67), 0.3, "unit", index=index)
    x = jax.device_put(rng.standard_normal((n, 67)).astype(np.float32))
    g = jax.device_put(rng.standard_normal((n, 33)).astype(np.float32))
    check(layer, x, g)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("n", [1, 3, 20])
def test_rows_that_outnumber_columns_are_added_up_in_parts(n, index, kernels):
    rng = np.random.default_rng(n)
    layer = layer_of((300, 9), 0.5, "unit", index=index)
    x = jax.device_put(rng.standard_normal((n, 9)).astype(np.float32))
    g = jax.device_put(rng.standard_normal((n, 300)).astype(np.float32))
    check(layer, x, g)


def test_more_vectors_than_one_walk_takes(kernels):
    rng = np.random.default_rng(0)
    layer = layer_of((5, 9), 0.5, "prime")
    x = jax.device_put(rng.standard_normal((2100, 9)).astype(np.float32))
    g = jax.device_put(rng.standard_normal((2100, 5)).astype(np.float32))
    check(layer, x, g)


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_vectors_are_read_exactly(dtype, n, kernels):
    rng = np.random.default_rng(n)
    layer = layer_of((33, 67), 0.3, "prime")
    scale = 1e-8  # keeps products of float16 inside its range
    layer = dataclasses.replace(layer, scales=layer.scales * np.float32(scale / np.max(layer.scales)))
    x = jnp.asarray(rng.standard_normal((n, 67)), dtype)
    g = jnp.asarray(rng.standard_normal((n, 33)), dtype)
    check(layer, x, g, dtype)


def test_subnormal_and_largest_half_precision_numbers_keep_their_value(kernels):
    layer = MdCSR.from_dense(np.eye(9, dtype=np.float32))
    x = jnp.asarray([0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, -65504, 1, -1], jnp.float16)
    y = multiply(x, x, layer)[0]
    np.testing.assert_array_equal(y, np.asarray(x))


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("n", [1, 17])
def test_a_row_longer_than_the_workspace(n, index, kernels):
    columns = 33_000
    rng = np.random.default_rng(0)
    w = rng.uniform(0.5, 1, (3, columns)).astype(np.float32)
    w[1, ::300] = 0
    layer = MdCSR.from_dense(w, index=index)
    x = jax.device_put(rng.standard_normal((n, columns)).astype(np.float32))
    g = jax.device_put(rng.standard_normal((n, 3)).astype(np.float32))
    levels = np.rint(w.astype(np.float64) / np.asarray(layer.scales)[:, None])
    y, gx = multiply(x, g, layer)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, levels, layer.scales, terms=columns + 2)
    assert_within_bound(gx, lambda g, w, s: g * s @ w, g, levels, layer.scales, terms=20)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("n", [1, 20])
def test_a_stack_gives_the_bits_of_its_layers(n, index, kernels):
    densities = (0.1, 0.5, 1.0)
    layers = [
        layer_of((33, 67), density, "prime", seed=i, index=index) for i, density in enumerate(densities)
    ]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, n, 67)).astype(np.float32)
    index = np.array([2, 0, 1, 0])
    on_host = [jax.tree.map(np.asarray, layer) for layer in layers]
    y = np.asarray(jax.jit(sparse_dense)(x, stack(on_host), index=index))
    for group, i in enumerate(index):
        np.testing.assert_array_equal(y[group], sparse_dense(x[group], layers[i]))
