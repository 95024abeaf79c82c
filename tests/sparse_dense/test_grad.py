"""Reverse mode, against the oracle's formula and central differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.backends import same_bits
from helpers.bounds import EPS, assert_within_bound, exact
from helpers.layers import Case, each_case, each_float32_case

from upg_jax import combine, partition, sparse_dense


def apply(layer, x, scales, bias=None):
    return sparse_dense(x, dataclasses.replace(layer, scales=scales), bias)


def pullback(layer, *args):
    """The vjp of `apply` as one compiled program."""
    return jax.jit(lambda ct: jax.vjp(lambda *args: apply(layer, *args), *args)[1](ct))


@each_case
def test_vjp_of_x_scales_and_bias(case, backend):
    x, scales, bias, ct = case.x(5), case.layer.scales, case.cotangent(), case.cotangent(5, salt=1)
    x_bar, scales_bar, bias_bar = pullback(case.layer, x, scales, bias)(ct)
    assert_within_bound(
        x_bar,
        lambda g, w, s: (g * s) @ w,
        *(ct, case.levels, scales),
        terms=case.terms,
        dtype=case.dtype,
    )
    assert_within_bound(
        scales_bar,
        lambda g, x, w: (g * (x @ w.T)).sum(0),
        *(ct, x, case.levels),
        terms=case.terms,
        dtype="float32",
    )
    assert_within_bound(bias_bar, lambda g: g.sum(0), ct, terms=case.terms, dtype=case.dtype)


@each_float32_case
def test_gradients_equal_central_differences(case, one_backend):
    """Along a line the loss is a quadratic, so central differences with step 1 are exact but for rounding."""
    x, scales, ct = case.x(5), case.layer.scales, exact(case.cotangent(5))
    dx, ds = case.x(5, salt=1), scales / 2

    def y(x, s):
        return apply(case.layer, x, s)

    gradients = jax.grad(lambda x, s: (y(x, s) * jnp.asarray(ct, jnp.float32)).sum(), (0, 1))(x, scales)
    slope = sum((exact(g) * exact(d)).sum() for g, d in zip(gradients, (dx, ds), strict=True))
    difference = ((exact(y(x + dx, scales + ds)) - exact(y(x - dx, scales - ds))) / 2 * ct).sum()
    magnitude = (np.abs(exact(x)) + np.abs(exact(dx))) @ np.abs(case.levels).T * exact(scales + ds)
    # Both values and both gradients are within the bound, taken at the summed magnitudes.
    tolerance = 4 * 2 * (case.terms + 2) * EPS * (magnitude * np.abs(ct)).sum()
    assert abs(slope - difference) <= tolerance + 2.0**-126


@pytest.mark.parametrize(("vectors", "manifold"), [(17, "prime"), (257, "unit")])
def test_gradients_over_many_vectors(vectors, manifold, backend):
    case = Case("random", (33, 67), manifold)
    x, ct = case.x(vectors), case.cotangent(vectors)
    x_bar, scales_bar = pullback(case.layer, x, case.layer.scales)(ct)
    assert_within_bound(
        x_bar, lambda g, w, s: (g * s) @ w, ct, case.levels, case.scales, terms=case.terms, dtype="float32"
    )
    assert_within_bound(
        scales_bar,
        lambda g, x, w: (g * (x @ w.T)).sum(0),
        *(ct, x, case.levels),
        terms=case.terms + vectors,
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (0,)], ids=str)
def test_gradients_without_rows_columns_or_vectors(shape, lead, backend):
    case = Case("zero", shape)
    x_bar, scales_bar = pullback(case.layer, case.x(*lead), case.layer.scales)(jnp.ones((*lead, shape[0])))
    np.testing.assert_array_equal(x_bar, np.zeros((*lead, shape[1]), np.float32))
    np.testing.assert_array_equal(scales_bar, np.zeros(shape[0], np.float32))


@same_bits
def test_gradient_of_a_layer_goes_through_partition():
    case = Case("random", (7, 13), "prime")
    params, rest = partition(case.layer)
    loss = jax.jit(jax.grad(lambda p: sparse_dense(case.x(5), combine(p, rest)).sum()))
    direct = jax.grad(lambda s: apply(case.layer, case.x(5), s).sum())(case.layer.scales)
    np.testing.assert_array_equal(loss(params).scales, direct)


def test_gradient_of_a_whole_layer_with_integers_allowed(one_backend):
    case = Case("random", (7, 13), "prime")
    loss = jax.grad(lambda layer: sparse_dense(case.x(5), layer).sum(), allow_int=True)
    gradient = loss(case.layer)
    direct = jax.grad(lambda s: apply(case.layer, case.x(5), s).sum())(case.layer.scales)
    np.testing.assert_array_equal(gradient.scales, direct)
    assert gradient.values.dtype == gradient.row_pointers.dtype == jax.dtypes.float0


def test_gradient_of_x_alone_does_not_compute_that_of_scales():
    case = Case("random", (7, 13))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: sparse_dense(x, case.layer).sum()))(case.x(5)))
    assert jaxpr.count("sparse_dense[") == 1
    assert jaxpr.count("dense_sparse[") == 1


@same_bits
@pytest.mark.parametrize("policy", [None, "nothing_saveable", "dots_saveable"])
def test_checkpoint_gives_the_same_gradients(policy, one_backend):
    case = Case("random", (7, 7), "prime")
    policy = policy and getattr(jax.checkpoint_policies, policy)

    def loss(x, scales, wrap):
        block = wrap(lambda x: jnp.tanh(apply(case.layer, x, scales)))
        return block(block(x)).sum()

    # As users compile: without LLVM's optimizations (see conftest.py) the two programs round differently.
    optimized = {"xla_backend_optimization_level": 3}
    plain, saved = (
        jax.jit(jax.grad(lambda x, s, wrap=wrap: loss(x, s, wrap), (0, 1)))
        .lower(case.x(3), case.layer.scales)
        .compile(compiler_options=optimized)(case.x(3), case.layer.scales)
        for wrap in (lambda f: f, lambda f: jax.checkpoint(f, policy=policy))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, saved)
