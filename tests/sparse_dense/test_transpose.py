"""`jax.linear_transpose` of the product: `g @ W`, and its own transpose."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, each_case

from upg_jax import sparse_dense


@each_case
def test_transpose_in_x(case, one_backend):
    x, ct = case.x(5), case.cotangent(5)
    (actual,) = jax.linear_transpose(lambda x: sparse_dense(x, case.layer), x)(ct)
    operands = (ct, case.levels, case.scales)
    assert_within_bound(actual, lambda g, w, s: (g * s) @ w, *operands, terms=case.terms, dtype=case.dtype)


def test_transpose_in_scales(one_backend):
    case = Case("random", (7, 13), "prime")
    x, ct = case.x(5), case.cotangent(5)

    def apply(scales):
        return sparse_dense(x, dataclasses.replace(case.layer, scales=scales))

    (actual,) = jax.jit(jax.linear_transpose(apply, case.layer.scales))(ct)
    operands = (ct, x, case.levels)
    assert_within_bound(actual, lambda g, x, w: (g * (x @ w.T)).sum(0), *operands, terms=case.terms)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_transpose_of_the_transpose_is_the_product(lead, one_backend):
    case = Case("random", (7, 13), "prime")

    def product(x):
        return sparse_dense(x, case.layer)

    def transposed(g):
        return jax.linear_transpose(product, case.x(*lead))(g)[0]

    (actual,) = jax.linear_transpose(transposed, case.cotangent(*lead))(case.x(*lead))
    np.testing.assert_array_equal(actual, product(case.x(*lead)))


def test_transpose_of_a_sum_of_products(one_backend):
    a, b = Case("random", (7, 13)), Case("full_row", (7, 13), "prime")

    def both(x):
        return sparse_dense(x, a.layer) + sparse_dense(x, b.layer)

    (actual,) = jax.jit(jax.linear_transpose(both, a.x(2)))(a.cotangent(2))
    operands = (a.cotangent(2), a.levels, a.scales, b.levels, b.scales)
    assert_within_bound(
        actual, lambda g, v, s, w, t: (g * s) @ v + (g * t) @ w, *operands, terms=a.terms + b.terms
    )
