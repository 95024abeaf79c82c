"""Forward mode, against the oracle's formula and central differences."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from helpers.bounds import EPS, assert_within_bound, exact
from helpers.layers import Case, each_case, each_float32_case

from upg_jax import sparse_dense


def apply(layer, x, scales, bias=None):
    return sparse_dense(x, dataclasses.replace(layer, scales=scales), bias)


def positive(case: Case, salt: int) -> np.ndarray:
    return np.random.default_rng(salt).uniform(0.5, 1.5, case.shape[0]).astype(np.float32)


@each_case
def test_jvp_of_x_scales_and_bias(case, one_backend):
    x, x_dot = case.x(5), case.x(5, salt=1)
    scales, scales_dot = case.layer.scales, positive(case, 1) * case.scales
    bias, bias_dot = case.cotangent(), case.cotangent(salt=1)
    primals, tangents = (x, scales, bias), (x_dot, scales_dot, bias_dot)
    y, y_dot = jax.jvp(lambda x, s, b: apply(case.layer, x, s, b), primals, tangents)
    assert_within_bound(
        y,
        lambda x, w, s, b: x @ w.T * s + b,
        x,
        case.levels,
        scales,
        bias,
        terms=case.terms,
        dtype=case.dtype,
    )
    assert_within_bound(
        y_dot,
        lambda x, dx, w, s, ds, db: dx @ w.T * s + x @ w.T * ds + db,
        *(x, x_dot, case.levels, scales, scales_dot, bias_dot),
        terms=2 * case.terms,
        dtype=case.dtype,
    )


@each_float32_case
def test_jvp_equals_central_differences(case, one_backend):
    """The product is bilinear, so central differences with step 1 are exact but for rounding."""
    x, scales = case.x(5), case.layer.scales
    x_dot, scales_dot = case.x(5, salt=1), positive(case, 1) * case.scales
    _, y_dot = jax.jvp(lambda x, s: apply(case.layer, x, s), (x, scales), (x_dot, scales_dot))
    forth = apply(case.layer, x + x_dot, scales + scales_dot)
    back = apply(case.layer, x - x_dot, scales - scales_dot)
    # Each of the two values, and the tangent itself, is off by at most the bound at the summed magnitudes.
    magnitude = (np.abs(exact(x)) + np.abs(exact(x_dot))) @ np.abs(case.levels).T
    magnitude = magnitude * (np.abs(exact(scales)) + np.abs(exact(scales_dot)))
    tolerance = 4 * (case.terms + 2) * EPS * magnitude + 2.0**-126
    assert np.all(np.abs(exact(y_dot) - (exact(forth) - exact(back)) / 2) <= tolerance)


def test_a_whole_layer_as_primal(one_backend):
    """Integer planes have tangents of dtype float0, which the rule must not touch."""
    case = Case("random", (7, 13), "prime")

    def tangent(leaf):
        is_float = leaf.dtype == np.float32
        return leaf if is_float else np.zeros(leaf.shape, jax.dtypes.float0)

    layer_dot = jax.tree.map(tangent, case.layer)
    y, y_dot = jax.jvp(lambda layer: sparse_dense(case.x(5), layer), (case.layer,), (layer_dot,))
    np.testing.assert_array_equal(y, y_dot)


def test_a_tangent_of_one_operand_costs_one_product():
    case = Case("random", (7, 13))

    def products(f, *args):
        return str(jax.make_jaxpr(lambda *a: jax.jvp(f, a, a))(*args)).count("sparse_dense[")

    assert products(lambda x: apply(case.layer, x, case.layer.scales), case.x()) == 2
    assert products(lambda s: apply(case.layer, case.x(), s), case.layer.scales) == 2
    assert products(lambda x, s: apply(case.layer, x, s), case.x(), case.layer.scales) == 3
