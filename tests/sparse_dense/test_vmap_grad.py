"""Gradients of vmapped products and vmapped gradients, of x, scales and through stacks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, each_case, stacked

from upg_jax import combine, partition, sparse_dense

SMALL = Case("random", (7, 13), "prime")


def apply(layer, x, scales):
    return sparse_dense(x, dataclasses.replace(layer, scales=scales))


@each_case
def test_vmap_of_grad_gives_a_gradient_per_example(case, one_backend):
    x, ct = case.x(4), case.cotangent(4)

    def vjp(x, ct):
        return jax.vjp(lambda x, s: apply(case.layer, x, s), x, case.layer.scales)[1](ct)

    x_bar, scales_bar = jax.jit(jax.vmap(vjp))(x, ct)
    assert_within_bound(
        x_bar,
        lambda g, w, s: (g * s) @ w,
        *(ct, case.levels, case.scales),
        terms=case.terms,
        dtype=case.dtype,
    )
    operands = (ct, x, case.levels)
    assert_within_bound(scales_bar, lambda g, x, w: g * (x @ w.T), *operands, terms=case.terms)


def test_grad_of_vmap_sums_over_examples(one_backend):
    x, ct = SMALL.x(4, 2), SMALL.cotangent(4, 2)

    def loss(x, s):
        return (jax.vmap(lambda x: apply(SMALL.layer, x, s))(x) * ct).sum()

    x_bar, scales_bar = jax.jit(jax.grad(loss, (0, 1)))(x, SMALL.layer.scales)
    operands = (ct, SMALL.levels, SMALL.scales)
    assert_within_bound(x_bar, lambda g, w, s: (g * s) @ w, *operands, terms=SMALL.terms)
    operands = (ct, x, SMALL.levels)
    assert_within_bound(scales_bar, lambda g, x, w: (g * (x @ w.T)).sum((0, 1)), *operands, terms=SMALL.terms)


@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad"])
def test_gradients_of_stacked_layers(order, one_backend):
    cases = [Case(kind, (7, 13), "prime", seed=s) for s, kind in enumerate(("random", "zero", "full"))]
    params, rest = partition(stacked(*cases))
    x, ct = SMALL.x(3, 2), SMALL.cotangent(3, 2)

    def one(x, p, r, ct):
        return (sparse_dense(x, combine(p, r)) * ct).sum()

    if order == "vmap of grad":
        gradient = jax.vmap(jax.grad(one, (0, 1)))
    else:
        gradient = jax.grad(lambda *args: jax.vmap(one)(*args).sum(), (0, 1))
    x_bar, params_bar = jax.jit(gradient)(x, params, rest, ct)
    levels = np.stack([c.levels for c in cases])
    operands = (ct, levels, params.scales)
    terms = max(c.terms for c in cases)
    assert_within_bound(x_bar, lambda g, w, s: (g * s[:, None]) @ w, *operands, terms=terms)
    assert_within_bound(
        params_bar.scales,
        lambda g, x, w: (g * (x @ np.swapaxes(w, 1, 2))).sum(1),
        *(ct, x, levels),
        terms=terms,
    )


def test_vmap_of_scales_under_grad(one_backend):
    x, ct = SMALL.x(2), SMALL.cotangent(3, 2)
    scales = jnp.stack([SMALL.layer.scales * jnp.float32(k) for k in (1, 2, 3)])

    def loss(x, scales):
        return (jax.vmap(lambda s: apply(SMALL.layer, x, s))(scales) * ct).sum()

    x_bar, scales_bar = jax.jit(jax.grad(loss, (0, 1)))(x, scales)
    operands = (ct, SMALL.levels, scales)
    assert_within_bound(
        x_bar, lambda g, w, s: ((g * s[:, None]) @ w).sum(0), *operands, terms=SMALL.terms + 3
    )
    operands = (ct, x, SMALL.levels)
    assert_within_bound(scales_bar, lambda g, x, w: (g * (x @ w.T)).sum(1), *operands, terms=SMALL.terms)


def test_vmap_of_hessian(one_backend):
    case = Case("random", (7, 5), "prime")
    x = case.x(3)
    hessian = jax.hessian(lambda x: (sparse_dense(x, case.layer) ** 2).sum() / 2)
    hessians = jax.jit(jax.vmap(hessian))(x)
    assert_within_bound(
        hessians, lambda w: np.broadcast_to(w.T @ w, (3, 5, 5)), case.weight, terms=2 * case.terms
    )
