"""Products of one input launched together: the values and derivatives of single ones, and one wait."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, stacked

from upg_jax import BackendError, combine, partition, use_backend
from upg_jax._sparse_dense import sparse_dense, sparse_dense_many

CASES = (Case("random", (33, 13)), Case("random", (7, 13), "prime"), Case("empty_rows", (1, 13)))
LAYERS = [case.layer for case in CASES]
X = CASES[0].x(2)


def separately(x, layers, biases=None, index=None):
    biases = [None] * len(layers) if biases is None else biases
    return [sparse_dense(x, layer, b, index=index) for layer, b in zip(layers, biases, strict=True)]


def assert_same(actual, expected):
    """The same kernels see the same data, so the same bits come out."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    """Sums over products of another order: a few roundings of numbers of order 10."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), actual, expected)


def test_values_are_those_of_single_products(emulator):
    assert_same(jax.jit(sparse_dense_many)(X, LAYERS), jax.jit(separately)(X, LAYERS))
    assert_same(sparse_dense_many(X, LAYERS), separately(X, LAYERS))
    biases = [jnp.arange(33.0), None, jnp.ones(1)]
    assert_same(sparse_dense_many(X, LAYERS, biases), separately(X, LAYERS, biases))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes(emulator, dtype):
    ys = sparse_dense_many(X.astype(dtype), LAYERS)
    assert {y.dtype for y in ys} == {jnp.dtype(dtype)}
    assert_same(ys, separately(X.astype(dtype), LAYERS))


def test_layers_of_stacks_are_read_in_place(emulator):
    stacks = [stacked(*(Case("random", (n, 13), seed=i) for i in range(3))) for n in (5, 8)]
    product = jax.jit(lambda x, i: sparse_dense_many(x, stacks, index=i))
    for i in range(3):
        assert_same(product(X, i), separately(X, stacks, index=i))
    index = jnp.asarray([2, 0])
    assert_same(product(X, index), separately(X, stacks, index=index))


def test_one_command_buffer_and_one_wait(emulator):
    product = jax.jit(sparse_dense_many)
    jax.block_until_ready(product(X, LAYERS))
    before = emulator.command_buffers
    jax.block_until_ready(product(X, LAYERS))
    assert emulator.command_buffers - before == 1
    jax.block_until_ready(jax.jit(separately)(X, LAYERS))
    assert emulator.command_buffers - before == 1 + len(LAYERS)


def test_vmap_over_the_input_stays_one_call(emulator):
    xs = CASES[0].x(3, 2)
    f = jax.vmap(sparse_dense_many, (0, None))
    assert_same(f(xs, LAYERS), separately(xs, LAYERS))
    assert str(jax.make_jaxpr(f)(xs, LAYERS)).count("sparse_dense_many[") == 1


def test_vmap_over_layers_and_over_some_operands(emulator):
    stacks = [stacked(*(Case("random", (n, 13), seed=i) for i in range(3))) for n in (5, 8)]
    xs = CASES[0].x(3, 2)
    assert_close(jax.vmap(sparse_dense_many)(xs, stacks), jax.vmap(separately)(xs, stacks))
    assert_close(
        jax.vmap(sparse_dense_many, (None, 0))(X, stacks), jax.vmap(separately, (None, 0))(X, stacks)
    )
    one_mapped = [stacks[0], LAYERS[1]]
    axes = (None, [0, None])
    out = (0, None)
    expected = jax.vmap(lambda x, some: tuple(separately(x, some)), axes, out)(X, one_mapped)
    assert_close(
        jax.vmap(lambda x, some: tuple(sparse_dense_many(x, some)), axes, out)(X, one_mapped), expected
    )


def loss_of(products):
    def loss(x, params, rest):
        return sum((y**2).sum() for y in products(x, combine(params, rest)))

    return loss


def test_derivatives_of_every_order(emulator):
    params, rest = partition(LAYERS)
    many, single = loss_of(sparse_dense_many), loss_of(separately)
    for transform in (
        lambda f: jax.grad(f, (0, 1)),
        lambda f: lambda x, p, r: jax.jvp(lambda x, p: f(x, p, r), (x, p), (x, p)),
        lambda f: lambda x, p, r: jax.hessian(f)(x[:1], p, r),
        lambda f: lambda x, p, r: jax.vmap(jax.grad(f), (0, None, None))(x, p, r),
    ):
        actual, expected = (jax.jit(transform(f))(X, params, rest) for f in (many, single))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), actual, expected)


def test_linear_transpose(emulator):
    cts = [case.cotangent(2) for case in CASES]
    actual, expected = (
        jax.linear_transpose(lambda x, f=f: f(x, LAYERS), X)(cts)[0] for f in (sparse_dense_many, separately)
    )
    assert_close(actual, expected)


def test_scan_over_stacks(emulator):
    stacks = [stacked(*(Case("random", (13, 13), seed=i + n) for i in range(3))) for n in (0, 5)]

    def chain(products):
        def body(x, i):
            a, b = products(x, stacks, index=i)
            return 0.1 * a + b, None

        return jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(3))[0])(X)

    assert_same(chain(sparse_dense_many), chain(separately))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_elsewhere_it_is_one_product_after_the_other(backend):
    with use_backend(backend):
        assert "sparse_dense_many[" not in str(jax.make_jaxpr(sparse_dense_many)(X, LAYERS))
        assert_same(sparse_dense_many(X, LAYERS), separately(X, LAYERS))


def test_arguments_are_checked_as_for_one(emulator):
    with pytest.raises(ValueError, match="in_features=1\\)"):
        sparse_dense_many(X, [LAYERS[0], Case("random", (3, 1)).layer])
    with pytest.raises(TypeError, match=r"must be an upg_jax\.MdCSR"):
        sparse_dense_many(X, [LAYERS[0], np.ones((3, 13))])
    with pytest.raises(ValueError, match="single one"):
        sparse_dense_many(X, LAYERS, index=0)


def test_another_platform_gets_single_products_unless_forced(emulator):
    function = jax.jit(lambda x: sparse_dense_many(x, LAYERS))
    with pytest.raises(BackendError, match="no kernels for the platform"):
        jax.export.export(function, platforms=["cuda"])(X)
