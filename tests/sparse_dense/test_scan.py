"""`lax.scan` over the layers of a stack, forward and in gradients, sliced by scan or read with `index`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked

from upg_jax import combine, partition, sparse_dense

CASES = [Case(k, (13, 13), "prime", "float32", 4, s) for s, k in enumerate(("random", "full", "full_row"))]
TERMS = sum(case.terms for case in CASES)


@functools.cache
def layers():
    return stacked(*CASES)


def sliced(x, layers):
    return jax.lax.scan(lambda x, layer: (sparse_dense(x, layer), None), x, layers)[0]


def indexed(x, layers):
    def body(x, i):
        return sparse_dense(x, layers, index=i), None

    return jax.lax.scan(body, x, jnp.arange(layers.stack_size))[0]


def unrolled(x, layers):
    return jax.lax.fori_loop(0, layers.stack_size, lambda i, x: sparse_dense(x, layers, index=i), x)


def chain(x, *weights):
    for w in weights:
        x = x @ w.T
    return x


@pytest.mark.parametrize("loop", [sliced, indexed, unrolled])
def test_a_chain_of_layers(loop, one_backend):
    x = CASES[0].x(2)
    y = jax.jit(loop)(x, layers())
    assert_within_bound(y, chain, x, *(case.weight for case in CASES), terms=TERMS)


@pytest.mark.parametrize("loop", [sliced, indexed])
def test_gradients_through_the_loop(loop, one_backend):
    x, ct = CASES[0].x(2), CASES[0].cotangent(2)
    params, rest = partition(layers())

    def loss(x, p):
        return (loop(x, combine(p, rest)) * ct).sum()

    x_bar, params_bar = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    w = [case.weight for case in CASES]
    levels = [case.levels for case in CASES]

    assert_within_bound(x_bar, lambda g, *w: chain(g, *(v.T for v in reversed(w))), ct, *w, terms=TERMS)

    def by_scales(g, x, w, levels):
        # dL/ds_k = (x W_1' .. W_{k-1}') Q_k' * (g W_n .. W_{k+1}), summed over vectors
        out = []
        for k in range(3):
            before, after = chain(x, *w[:k]), chain(g, *(v.T for v in reversed(w[k + 1 :])))
            out.append(((before @ levels[k].T) * after).sum(0))
        return np.stack(out)

    operands = (ct, x, np.stack(w), np.stack(levels))
    assert_within_bound(params_bar.scales, by_scales, *operands, terms=2 * TERMS)


def test_scan_collects_the_outputs_of_each_layer(one_backend):
    x = CASES[0].x(2)

    def body(carry, layer):
        return carry, sparse_dense(x, layer)

    y = jax.lax.scan(body, None, layers())[1]
    np.testing.assert_array_equal(y, jax.vmap(sparse_dense, (None, 0))(x, layers()))
