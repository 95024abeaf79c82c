"""`MdCSR` inside equinox and flax nnx modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case

from upg_jax import MdCSR, combine, partition, sparse_dense, stack

CASE = Case("random", (5, 7), "prime")
X = CASE.x(3)


def test_equinox_module_with_a_layer_trains_its_scales():
    eqx = pytest.importorskip("equinox")

    class Linear(eqx.Module):
        weight: MdCSR
        bias: jax.Array

        def __call__(self, x):
            return sparse_dense(x, self.weight, self.bias)

    module = Linear(CASE.layer, jnp.ones(5))
    expected = jax.jit(sparse_dense)(X, CASE.layer, jnp.ones(5))
    np.testing.assert_array_equal(eqx.filter_jit(module)(X), expected)
    np.testing.assert_array_equal(eqx.filter_jit(eqx.filter_vmap(module))(X), expected)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    assert len(jax.tree.leaves(params)) == 2
    assert eqx.combine(params, static).weight.shape == (5, 7)
    grads = eqx.filter_grad(lambda m: m(X).sum())(module)
    assert grads.weight.values is None
    direct = jax.grad(lambda m: eqx.combine(m, static)(X).sum())(params)
    np.testing.assert_array_equal(grads.weight.scales, direct.weight.scales)
    updated = eqx.apply_updates(module, grads)
    np.testing.assert_array_equal(updated.weight.scales, CASE.layer.scales + grads.weight.scales)
    assert "prime manifold" in repr(updated.weight)


def test_equinox_scan_over_a_stack_of_modules():
    eqx = pytest.importorskip("equinox")

    class Linear(eqx.Module):
        weight: MdCSR

        def __call__(self, x):
            return sparse_dense(x, self.weight)

    layers = [Case("random", (7, 7), seed=s).layer for s in range(2)]
    modules = Linear(stack(layers))
    expected = sparse_dense(sparse_dense(X, layers[0]), layers[1])
    np.testing.assert_array_equal(jax.lax.scan(lambda x, m: (m(x), None), X, modules)[0], expected)


def test_nnx_module_with_a_layer_trains_its_scales():
    nnx = pytest.importorskip("flax.nnx")

    class Linear(nnx.Module):
        def __init__(self, layer):
            self.weight = nnx.data(layer)
            self.bias = nnx.Param(jnp.ones(5))

        def __call__(self, x):
            return sparse_dense(x, self.weight, self.bias[...])

    module = Linear(CASE.layer)
    expected = jax.jit(sparse_dense)(X, CASE.layer, jnp.ones(5))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(module, X), expected)

    grads = nnx.grad(lambda m: m(X).sum())(module)
    np.testing.assert_array_equal(grads["bias"][...], np.full(5, 3, np.float32))

    # The layer is data and no Param, so its one float plane is selected by name.
    def is_scales(path, _):
        return path[-1] == "scales"

    grads = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, is_scales))(module)
    params, rest = partition(CASE.layer)
    direct = jax.grad(lambda p: sparse_dense(X, combine(p, rest)).sum())(params)
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], direct.scales)
