"""vmap over the vectors, the scales and the bias: one call, whatever the axis."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, each_case

from upg_jax import sparse_dense

SMALL = Case("random", (7, 13), "prime")


def apply(layer, x, scales, bias=None):
    return sparse_dense(x, dataclasses.replace(layer, scales=scales), bias)


def product(x, w, s):
    return x @ w.T * s


def calls(f, *args) -> int:
    return str(jax.make_jaxpr(f)(*args)).count("sparse_dense[")


def many_scales(case: Case, n: int) -> jnp.ndarray:
    rng = np.random.default_rng(n)
    return jax.device_put(rng.uniform(0.5, 1.5, (n, case.shape[0])).astype(np.float32) * case.scales)


@each_case
def test_vmap_over_x(case, one_backend):
    x = case.x(3, 2)
    y = jax.vmap(lambda x: sparse_dense(x, case.layer))(x)
    operands = (x, case.levels, case.scales)
    assert_within_bound(y, product, *operands, terms=case.terms, dtype=case.dtype)


@pytest.mark.parametrize("in_axis", [0, 1, -1])
@pytest.mark.parametrize("out_axis", [0, -1])
def test_vmap_over_any_axis_of_x_is_one_call(in_axis, out_axis, one_backend):
    x = jnp.moveaxis(SMALL.x(3, 2), 0, in_axis)
    mapped = jax.vmap(lambda x: sparse_dense(x, SMALL.layer), in_axis, out_axis)
    assert calls(mapped, x) == 1
    expected = sparse_dense(SMALL.x(3, 2), SMALL.layer)
    np.testing.assert_array_equal(mapped(x), jnp.moveaxis(expected, 0, out_axis))


def test_vmap_without_examples(one_backend):
    assert jax.vmap(lambda x: sparse_dense(x, SMALL.layer))(SMALL.x(0, 2)).shape == (0, 2, 7)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_of_scales_alone_shares_one_product(axis, one_backend):
    x, scales = SMALL.x(2), many_scales(SMALL, 3)
    mapped = jax.vmap(lambda s: apply(SMALL.layer, x, s), in_axes=axis)
    y = mapped(jnp.moveaxis(scales, 0, axis))
    operands = (x, SMALL.levels, scales)
    assert_within_bound(y, lambda x, w, s: (x @ w.T) * s[:, None], *operands, terms=SMALL.terms)
    jaxpr = str(jax.make_jaxpr(mapped)(jnp.moveaxis(scales, 0, axis)))
    assert jaxpr.count("sparse_dense[") == 1
    # The product is taken once, not once per example.
    assert "f32[2,7] = sparse_dense[" in jaxpr


def test_vmap_of_x_and_scales_together(one_backend):
    x, scales = SMALL.x(3, 2), many_scales(SMALL, 3)
    y = jax.vmap(lambda x, s: apply(SMALL.layer, x, s))(x, scales)
    operands = (x, SMALL.levels, scales)
    assert_within_bound(y, lambda x, w, s: (x @ w.T) * s[:, None], *operands, terms=SMALL.terms)


def test_vmap_of_scales_in_the_transposed_product(one_backend):
    ct, scales = SMALL.cotangent(2), many_scales(SMALL, 3)

    def transposed(g, s):
        return jax.linear_transpose(lambda x: apply(SMALL.layer, x, s), SMALL.x(2))(g)[0]

    def formula(g, w, s):
        return (g * s[:, None]) @ w

    one_ct = jax.vmap(transposed, (None, 0))(ct, scales)
    assert_within_bound(one_ct, formula, ct, SMALL.levels, scales, terms=SMALL.terms)
    cts = SMALL.cotangent(3, 2)
    each_ct = jax.vmap(transposed)(cts, scales)
    assert_within_bound(each_ct, formula, cts, SMALL.levels, scales, terms=SMALL.terms)


def test_vmap_of_the_bias(one_backend):
    x, bias = SMALL.x(2), SMALL.cotangent(3)
    y = jax.vmap(lambda b: sparse_dense(x, SMALL.layer, b))(bias)
    operands = (x, SMALL.levels, SMALL.scales, bias)
    assert_within_bound(y, lambda x, w, s, b: (x @ w.T * s)[None] + b[:, None], *operands, terms=SMALL.terms)


def test_nested_vmaps_of_x_are_one_call(one_backend):
    x = SMALL.x(2, 3, 4)
    mapped = jax.vmap(jax.vmap(lambda x: sparse_dense(x, SMALL.layer), 1, 1))
    assert calls(mapped, x) == 1
    np.testing.assert_array_equal(mapped(x), sparse_dense(x, SMALL.layer))


def test_vmap_of_x_inside_vmap_of_scales(one_backend):
    x, scales = SMALL.x(2, 3), many_scales(SMALL, 4)
    y = jax.vmap(jax.vmap(lambda x, s: apply(SMALL.layer, x, s), (0, None)), (None, 0))(x, scales)
    z = jax.vmap(jax.vmap(lambda x, s: apply(SMALL.layer, x, s), (None, 0)), (0, None))(x, scales)
    operands = (x, SMALL.levels, scales)
    assert_within_bound(y, lambda x, w, s: (x @ w.T) * s[:, None, None], *operands, terms=SMALL.terms)
    assert_within_bound(z, lambda x, w, s: (x @ w.T)[:, None] * s[:, None], *operands, terms=SMALL.terms)
