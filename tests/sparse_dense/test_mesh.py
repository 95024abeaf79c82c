"""Sharded arrays under jit: a mesh with Auto axes, and one with Explicit axes."""

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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from upg_jax import combine, partition, sparse_dense

pytestmark = needs_four_devices

CASE = Case("random", (7, 13), "prime")
X, CT = CASE.x(8, 2), CASE.cotangent(8, 2)


def formula(x, w):
    return x @ w.T


@functools.cache
def mesh(kind: str):
    if not hasattr(jax.sharding, "AxisType"):
        return jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    return jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))


def put(array, kind, *spec):
    return jax.device_put(array, NamedSharding(mesh(kind), P(*spec)))


def check_gradients(f, x, ct):
    params, rest = partition(CASE.layer)
    y, vjp = jax.vjp(lambda x, p: f(x, combine(p, rest)), x, params)
    x_bar, params_bar = vjp(ct)
    assert_within_bound(y, formula, X, CASE.weight, terms=CASE.terms)
    assert_within_bound(x_bar, lambda g, w: g @ w, CT, CASE.weight, terms=CASE.terms)
    operands = (CT, X, CASE.levels)
    assert_within_bound(
        params_bar.scales, lambda g, x, q: (g * (x @ q.T)).sum((0, 1)), *operands, terms=CASE.terms
    )
    return y, x_bar


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("spec", [("data",), ()], ids=str)
def test_auto_mesh_with_sharded_vectors(spec, jit, one_backend):
    f = jax.jit(sparse_dense) if jit else sparse_dense
    check_gradients(f, put(X, "Auto", *spec), put(CT, "Auto", *spec))


def test_auto_mesh_with_sharded_features(one_backend):
    x = put(jnp.pad(X, ((0, 0), (0, 0), (0, 3))), "Auto", None, None, "data")
    y = jax.jit(lambda x: sparse_dense(x[..., :13], CASE.layer))(x)
    assert_within_bound(y, formula, X, CASE.weight, terms=CASE.terms)


def test_auto_mesh_with_a_replicated_layer_and_an_index(one_backend):
    layers = jax.tree.map(lambda leaf: put(leaf, "Auto"), stacked(CASE, CASE))
    y = jax.jit(lambda x, layers: sparse_dense(x, layers, index=1))(put(X, "Auto", "data"), layers)
    assert_within_bound(y, formula, X, CASE.weight, terms=CASE.terms)


explicit = needs("sharding.AxisType")


@explicit
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("spec", [("data",), (None,)], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["no context", "set_mesh"])
def test_explicit_mesh_keeps_the_sharding_of_the_leading_axes(spec, jit, inside, one_backend):
    f = jax.jit(sparse_dense) if jit else sparse_dense
    x, ct = put(X, "Explicit", *spec), put(CT, "Explicit", *spec)
    if inside:
        with jax.set_mesh(mesh("Explicit")):
            y, x_bar = check_gradients(f, x, ct)
    else:
        y, x_bar = check_gradients(f, x, ct)
    assert jax.typeof(y).sharding.spec == P(*spec, None, None)
    assert jax.typeof(x_bar).sharding.spec == P(*spec, None, None)


@explicit
def test_explicit_mesh_with_bias_and_index(one_backend):
    layers, bias = stacked(CASE, CASE), CASE.cotangent()
    x = put(X, "Explicit", "data")
    with jax.set_mesh(mesh("Explicit")):
        y = jax.jit(lambda x, i: sparse_dense(x, layers, bias, index=i))(x, 1)
    assert_within_bound(y, lambda x, w, b: x @ w.T + b, X, CASE.weight, bias, terms=CASE.terms)


@explicit
@pytest.mark.parametrize("axis", [0, 1])
def test_explicit_mesh_under_vmap(axis, one_backend):
    x = put(X, "Explicit", "data")
    with jax.set_mesh(mesh("Explicit")):
        y = jax.jit(jax.vmap(lambda x: sparse_dense(x, CASE.layer), axis, axis))(x)
    assert_within_bound(y, formula, X, CASE.weight, terms=CASE.terms)


@explicit
def test_explicit_mesh_under_scan(one_backend):
    case = Case("random", (13, 13), "prime")
    layers = stacked(case, case)
    x = put(case.x(8), "Explicit", "data")
    with jax.set_mesh(mesh("Explicit")):
        y = jax.jit(lambda x, layers: jax.lax.scan(lambda x, w: (sparse_dense(x, w), None), x, layers)[0])(
            x, layers
        )
    operands = (case.x(8), case.weight)
    assert_within_bound(y, lambda x, w: x @ w.T @ w.T, *operands, terms=2 * case.terms)


@explicit
def test_explicit_mesh_with_sharded_features_is_refused_by_name():
    x = put(jnp.ones((8, 16)), "Explicit", None, "data")
    layer = Case("random", (7, 16)).layer
    with pytest.raises(
        ValueError, match=r"last dimension of x must not be sharded; .* 'data'; use jax.shard_map"
    ):
        sparse_dense(x, layer)
