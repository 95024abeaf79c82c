"""Second derivatives in every order of modes, against closed forms and differences of gradients."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers.bounds import EPS, assert_within_bound, exact
from helpers.layers import Case

from upg_jax import sparse_dense

CASES = [Case("random", (7, 5), "prime"), Case("empty_rows", (5, 7), row_alignment=8)]
MODES = {
    "forward over reverse": lambda f, arg=0: jax.jacfwd(jax.grad(f, arg), arg),
    "reverse over reverse": lambda f, arg=0: jax.jacrev(jax.grad(f, arg), arg),
    "reverse over forward": lambda f, arg=0: jax.jacrev(jax.jacfwd(f, arg), arg),
    "forward over forward": lambda f, arg=0: jax.jacfwd(jax.jacfwd(f, arg), arg),
}
each_mode = pytest.mark.parametrize("hessian", MODES.values(), ids=MODES)


def energy(layer):
    def f(x, scales):
        y = sparse_dense(x, dataclasses.replace(layer, scales=scales))
        return (y * y).sum() / 2

    return f


@pytest.mark.parametrize("case", CASES, ids=str)
@each_mode
def test_hessian_of_x(case, hessian, one_backend):
    x, scales = case.x(), case.layer.scales
    actual = jax.jit(hessian(energy(case.layer)))(x, scales)
    terms = 2 * case.terms
    assert_within_bound(
        actual, lambda w, s: (w * s[:, None]).T @ (w * s[:, None]), case.levels, scales, terms=terms
    )


@each_mode
def test_hessian_of_scales(hessian, one_backend):
    case = CASES[0]
    x, scales = case.x(3), case.layer.scales
    actual = jax.jit(hessian(energy(case.layer), 1))(x, scales)

    def formula(x, w):
        return np.diag(((x @ w.T) ** 2).sum(0))

    assert_within_bound(actual, formula, x, case.levels, terms=2 * case.terms)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_mixed_derivative_of_x_and_scales(jacobian, one_backend):
    case = CASES[0]
    x, scales = case.x(), case.layer.scales
    mixed = jax.jit(jacobian(jax.grad(energy(case.layer)), 1))(x, scales)
    swapped = jax.jit(jax.jacrev(jax.grad(energy(case.layer), 1), 0))(x, scales)

    def formula(x, w, s):
        return 2 * s * (x @ w.T) * w.T

    assert_within_bound(mixed, formula, x, case.levels, scales, terms=2 * case.terms)
    assert_within_bound(swapped.T, formula, x, case.levels, scales, terms=2 * case.terms)


def test_hessian_vector_product_equals_differences_of_gradients(one_backend):
    """The gradient is linear in x, so central differences with step 1 are exact but for rounding."""
    case = Case("random", (33, 67), "prime")
    x, v, scales = case.x(), case.x(salt=1), case.layer.scales
    gradient = jax.jit(jax.grad(energy(case.layer)))
    product = jax.jvp(lambda x: gradient(x, scales), (x,), (v,))[1]
    difference = (exact(gradient(x + v, scales)) - exact(gradient(x - v, scales))) / 2
    w = np.abs(case.levels * exact(scales)[:, None])
    magnitude = (np.abs(exact(x)) + np.abs(exact(v))) @ w.T @ w
    assert np.all(np.abs(exact(product) - difference) <= 4 * 2 * (case.terms + 2) * EPS * magnitude)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_jacobians(jacobian, one_backend):
    case = CASES[0]
    x, scales = case.x(2), case.layer.scales

    def apply(x, s):
        return sparse_dense(x, dataclasses.replace(case.layer, scales=s))

    by_x, by_scales = jax.jit(jacobian(apply, (0, 1)))(x, scales)

    def formula_x(w, s):
        return np.einsum("rc,r,mn->mrnc", w, s, np.eye(2))

    def formula_scales(x, w):
        return np.einsum("nr,rs->nrs", x @ w.T, np.eye(len(w)))

    assert_within_bound(by_x, formula_x, case.levels, scales, terms=case.terms)
    assert_within_bound(by_scales, formula_scales, x, case.levels, terms=case.terms)


def test_third_order_is_the_derivative_of_a_constant(one_backend):
    case = CASES[1]
    third = jax.jit(jax.jacfwd(jax.hessian(energy(case.layer))))(case.x(), case.layer.scales)
    np.testing.assert_array_equal(third, np.zeros((7, 7, 7), np.float32))
