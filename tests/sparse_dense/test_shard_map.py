"""Tensor and data parallelism under `jax.shard_map` with its default checks, gradients included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.backends import needs_four_devices
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked
from helpers.versions import needs
from jax.sharding import PartitionSpec as P

from upg_jax import combine, partition, sparse_dense

pytestmark = [needs("shard_map"), needs_four_devices]

DEVICES = 4
# One block of the matrix per device, among them an empty one; each block's planes end in other padding.
KINDS = ("random", "zero", "full", "full_row")
ROW_BLOCKS = [Case(kind, (5, 13), "prime", seed=s) for s, kind in enumerate(KINDS)]
COLUMN_BLOCKS = [Case(kind, (7, 11), "prime", seed=s) for s, kind in enumerate(KINDS)]
ZERO_BLOCKS = [Case("zero", (5, 13))] * DEVICES


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


def split(cases):
    return partition(stacked(*cases))


def column_parallel(x, params, rest):
    """x replicated, rows of W over devices -> y with its features over devices."""
    return sparse_dense(x, combine(params, rest), index=0)


def row_parallel(x, params, rest):
    """Features of x and columns of W over devices -> y replicated."""
    return jax.lax.psum(sparse_dense(x, combine(params, rest), index=0), "model")


def data_parallel(x, params, rest):
    """x over devices, W replicated."""
    return sparse_dense(x, combine(params, rest), index=0)


def sharded(body, x_spec, layer_spec, out_spec):
    return jax.shard_map(body, mesh=mesh(), in_specs=(x_spec, layer_spec, layer_spec), out_specs=out_spec)


def check(f, x, ct, cases, axis, backend_terms, jit=True):
    """Value and both gradients against the whole matrix."""
    params, rest = split(cases)

    def value_and_pullback(x, params, ct):
        y, vjp = jax.vjp(lambda x, p: f(x, p, rest), x, params)
        return y, *vjp(ct)

    y, x_bar, params_bar = (jax.jit(value_and_pullback) if jit else value_and_pullback)(x, params, ct)
    levels = np.concatenate([c.levels for c in cases], axis)
    w = np.concatenate([c.weight for c in cases], axis)
    assert_within_bound(y, lambda x, w: x @ w.T, x, w, terms=backend_terms)
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, w, terms=backend_terms)

    def by_scales(g, x, levels):
        if axis == 0:
            return (g * (x @ levels.T)).sum(0).reshape(len(cases), -1)
        blocks = levels.reshape(len(levels), len(cases), -1)
        return np.einsum("nr,nbc,rbc->br", g, x.reshape(len(x), len(cases), -1), blocks)

    assert_within_bound(params_bar.scales, by_scales, ct, x, levels, terms=backend_terms)


each_mode = pytest.mark.parametrize(
    "jit", [pytest.param(True, id="jit"), pytest.param(False, id="eager", marks=pytest.mark.slow)]
)
TERMS = sum(case.terms for case in ROW_BLOCKS)


@pytest.mark.parametrize("cases", [ROW_BLOCKS, ZERO_BLOCKS], ids=["mixed", "zero"])
@each_mode
def test_column_parallel(cases, jit, backend):
    x, ct = Case("random", (20, 13)).x(6), Case("random", (20, 13)).cotangent(6)
    check(sharded(column_parallel, P(), P("model"), P(None, "model")), x, ct, cases, 0, TERMS, jit)


@each_mode
def test_row_parallel(jit, backend):
    x, ct = Case("random", (7, 44)).x(6), Case("random", (7, 44)).cotangent(6)
    f = sharded(row_parallel, P(None, "model"), P("model"), P())
    check(f, x, ct, COLUMN_BLOCKS, 1, TERMS, jit)


def test_data_parallel_sums_the_gradient_of_replicated_scales(one_backend):
    x, ct = ROW_BLOCKS[0].x(8), ROW_BLOCKS[0].cotangent(8)
    check(sharded(data_parallel, P("model"), P(), P("model")), x, ct, ROW_BLOCKS[:1], 0, TERMS)


def test_a_column_parallel_layer_feeds_a_row_parallel_one(one_backend):
    """The two-layer block of a transformer: one psum, and the gradient of x is whole."""
    up = [Case("random", (5, 13), "prime", seed=s) for s in range(DEVICES)]
    down = [Case("random", (7, 5), "prime", seed=s) for s in range(DEVICES)]
    (up_params, up_rest), (down_params, down_rest) = split(up), split(down)

    def block(x, up_params, down_params, up_rest, down_rest):
        h = sparse_dense(x, combine(up_params, up_rest), index=0)
        return jax.lax.psum(sparse_dense(h, combine(down_params, down_rest), index=0), "model")

    f = jax.shard_map(block, mesh=mesh(), in_specs=(P(), *[P("model")] * 4), out_specs=P())
    x, ct = up[0].x(3), down[0].cotangent(3)

    @jax.jit
    def value_and_pullback(x, up_params, down_params, ct):
        y, vjp = jax.vjp(lambda x, p, q: f(x, p, q, up_rest, down_rest), x, up_params, down_params)
        return y, *vjp(ct)

    y, x_bar, up_bar, down_bar = value_and_pullback(x, up_params, down_params, ct)
    v, w = np.concatenate([c.weight for c in up]), np.concatenate([c.weight for c in down], axis=1)
    terms = 2 * TERMS
    assert_within_bound(y, lambda x, v, w: x @ v.T @ w.T, x, v, w, terms=terms)
    assert_within_bound(x_bar, lambda g, v, w: g @ w @ v, ct, v, w, terms=terms)
    up_levels = np.concatenate([c.levels for c in up])
    down_levels = np.stack([c.levels for c in down])
    assert_within_bound(
        up_bar.scales,
        lambda g, x, q, w: ((g @ w) * (x @ q.T)).sum(0).reshape(DEVICES, 5),
        *(ct, x, up_levels, w),
        terms=terms,
    )
    assert_within_bound(
        down_bar.scales,
        lambda g, x, v, q: np.einsum("nr,nbh,brh->br", g, (x @ v.T).reshape(3, DEVICES, 5), q),
        *(ct, x, v, down_levels),
        terms=terms,
    )


def test_forward_mode_and_vmap_inside_the_map(one_backend):
    params, rest = split(ROW_BLOCKS)
    x, x_dot = ROW_BLOCKS[0].x(3, 2), ROW_BLOCKS[0].x(3, 2, salt=1)

    def body(x, x_dot, params, rest):
        def one(x, x_dot):
            return jax.jvp(lambda x: column_parallel(x, params, rest), (x,), (x_dot,))[1]

        return jax.vmap(one)(x, x_dot)

    f = jax.shard_map(
        body, mesh=mesh(), in_specs=(P(), P(), P("model"), P("model")), out_specs=P(None, None, "model")
    )
    w = np.concatenate([c.weight for c in ROW_BLOCKS])
    assert_within_bound(jax.jit(f)(x, x_dot, params, rest), lambda x, w: x @ w.T, x_dot, w, terms=TERMS)


def test_vmap_around_the_map(one_backend):
    params, rest = split(ROW_BLOCKS)
    x = ROW_BLOCKS[0].x(3, 2)
    f = sharded(column_parallel, P(), P("model"), P(None, "model"))
    y = jax.jit(jax.vmap(lambda x: f(x, params, rest)))(x)
    w = np.concatenate([c.weight for c in ROW_BLOCKS])
    assert_within_bound(y, lambda x, w: x @ w.T, x, w, terms=TERMS)


def test_gradient_taken_inside_the_map(one_backend):
    """Each device differentiates its own loss: `x` varies there, the replicated scales do not."""
    params, rest = split(ROW_BLOCKS[:1])
    x, ct = ROW_BLOCKS[0].x(8), ROW_BLOCKS[0].cotangent(8)

    def body(x, ct, params, rest):
        def loss(x, params):
            return (sparse_dense(x, combine(params, rest), index=0) * ct).sum()

        return jax.grad(loss, (0, 1))(x, params)

    f = jax.shard_map(
        body, mesh=mesh(), in_specs=(P("model"), P("model"), P(), P()), out_specs=(P("model"), P())
    )
    x_bar, params_bar = jax.jit(f)(x, ct, params, rest)
    case = ROW_BLOCKS[0]
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, case.weight, terms=TERMS)
    assert_within_bound(
        params_bar.scales, lambda g, x, q: (g * (x @ q.T)).sum(0)[None], ct, x, case.levels, terms=TERMS
    )


def test_scan_over_layers_inside_the_map(one_backend):
    cases = [Case("random", (13, 13), "prime", seed=s) for s in range(2)]
    layers = stacked(*cases)
    x = cases[0].x(8)

    def body(x, layers):
        def step(x, i):
            return sparse_dense(x, layers, index=i), None

        return jax.lax.scan(step, x, jnp.arange(2))[0]

    f = jax.shard_map(body, mesh=mesh(), in_specs=(P("model"), P()), out_specs=P("model"))
    y = jax.jit(f)(x, layers)
    operands = (x, *(c.weight for c in cases))
    assert_within_bound(y, lambda x, v, w: x @ v.T @ w.T, *operands, terms=2 * cases[0].terms)
