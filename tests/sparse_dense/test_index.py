"""`index=`: which layer of a stack, as a number, a traced scalar or an array over leading dimensions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked

from upg_jax import combine, partition, sparse_dense

CASES = [Case(k, (7, 13), "prime", "float32", 4, s) for s, k in enumerate(("random", "zero", "full"))]
WEIGHTS = np.stack([case.weight for case in CASES])
TERMS = max(case.terms for case in CASES)


@functools.cache
def layers():
    return stacked(*CASES)


def chosen_product(x, w):
    return x @ np.swapaxes(w, -1, -2)


def jitted(x, i):
    return _jitted(x, layers(), i)


_jitted = jax.jit(lambda x, layers, i: sparse_dense(x, layers, index=i))


@pytest.mark.parametrize("index", [0, 2, -1, -3, np.int64(1), np.uint8(2)])
def test_python_and_numpy_integers(index, one_backend):
    x = CASES[0].x(2)
    y = sparse_dense(x, layers(), index=index)
    assert_within_bound(y, chosen_product, x, WEIGHTS[int(index)], terms=TERMS)


@pytest.mark.parametrize("index", [3, -4, 10**12])
def test_integers_outside_the_stack_are_refused(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range for a stack of 3 layers"):
        sparse_dense(CASES[0].x(2), layers(), index=index)


@pytest.mark.parametrize(("index", "layer"), [(1, 1), (-1, 2), (-3, 0), (3, 2), (99, 2), (-4, 0), (-99, 0)])
def test_traced_scalars_count_from_the_end_and_are_clamped(index, layer, one_backend):
    x = CASES[0].x(2)
    expected = sparse_dense(x, layers(), index=layer)
    np.testing.assert_array_equal(jitted(x, jnp.int32(index)), expected)
    np.testing.assert_array_equal(sparse_dense(x, layers(), index=jnp.int32(index)), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32", "int32"])
def test_every_integer_dtype(dtype):
    x = CASES[0].x(2)
    np.testing.assert_array_equal(jitted(x, jnp.asarray(2, dtype)), sparse_dense(x, layers(), index=2))


@pytest.mark.parametrize(
    ("index", "lead"),
    [
        ([2, 0], (2,)),
        ([2, 0], (2, 5)),
        ([[0, 1, 2], [-1, 7, -9]], (2, 3)),
        ([[0, 1, 2], [-1, 7, -9]], (2, 3, 1, 4)),
        (np.zeros((0,), int), (0,)),
        (np.zeros((0,), int), (0, 4)),
        ([1, 1], (2, 0)),
    ],
)
def test_arrays_choose_a_layer_for_each_group_of_vectors(index, lead, backend):
    x = CASES[0].x(*lead)
    index = np.array(index)
    y = jitted(x, jnp.asarray(index, jnp.int32))
    clamped = np.clip(np.where(index < 0, index + 3, index), 0, 2)
    chosen = WEIGHTS[clamped]
    for _ in range(x.ndim - 2 - index.ndim):
        chosen = chosen[..., None, :, :]
    rows = x[..., None, :] if index.ndim == x.ndim - 1 else x

    def formula(x, w):
        return np.swapaxes(w @ np.swapaxes(x, -1, -2), -1, -2)

    assert_within_bound(y.reshape(*rows.shape[:-1], 7), formula, rows, chosen, terms=TERMS)


@pytest.mark.parametrize("index", [[1, 2], np.array([-2, 2]), np.array([1, 9], np.uint8)], ids=str)
def test_lists_and_numpy_arrays_of_integers(index):
    x = CASES[0].x(2)
    np.testing.assert_array_equal(sparse_dense(x, layers(), index=index), jitted(x, jnp.array([1, 2])))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (1.0, TypeError, "index must be integers; got float64"),
        (True, TypeError, "index must be integers; got bool"),
        (jnp.float32(1), TypeError, "index must be integers; got float32"),
        (np.array([0.0, 1.0]), TypeError, "index must be integers; got float"),
        (np.zeros(3, int), ValueError, r"prefix of x's leading shape \(2, 5\); got \(3,\)"),
        (np.zeros((2, 5, 13), int), ValueError, r"prefix .*got \(2, 5, 13\)"),
    ],
)
def test_other_indices_are_refused(index, error, message):
    with pytest.raises(error, match=message):
        sparse_dense(CASES[0].x(2, 5), layers(), index=index)


def test_a_stack_without_layers_is_refused():
    none = jax.tree.map(lambda leaf: leaf[:0], layers())
    with pytest.raises(ValueError, match="this stack has none"):
        sparse_dense(CASES[0].x(2), none, index=jnp.int32(0))


def test_bias_with_an_index(one_backend):
    x, bias = CASES[0].x(2), CASES[0].cotangent()
    y = sparse_dense(x, layers(), bias, index=0)
    assert_within_bound(y, lambda x, w, b: x @ w.T + b, x, WEIGHTS[0], bias, terms=TERMS)


@pytest.mark.parametrize("index", [0, [2, 0, 2, 1]], ids=str)
def test_gradients_reach_x_and_the_chosen_scales_only(index, one_backend):
    x, ct = CASES[0].x(4, 2), CASES[0].cotangent(4, 2)
    params, rest = partition(layers())

    def loss(x, p):
        i = jnp.asarray(index)
        return (sparse_dense(x, combine(p, rest), index=i) * ct).sum()

    x_bar, params_bar = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    levels = np.stack([case.levels for case in CASES])[index]
    scales = np.asarray(params.scales)[index]
    assert_within_bound(x_bar, lambda g, w, s: (g * s[..., None, :]) @ w, ct, levels, scales, terms=TERMS)

    def formula(g, x, w):
        z = (g * (x @ np.swapaxes(w, -1, -2))).sum(1)
        summed = np.zeros((3, 7))
        np.add.at(summed, np.broadcast_to(index, 4), z)
        return summed

    assert_within_bound(params_bar.scales, formula, ct, x, levels, terms=TERMS)


def operands_of_the_product(jaxpr, known):
    """What the primitive is bound to, of the program's inputs; JAX 0.12 keeps a call where others inline it."""
    for eqn in jaxpr.eqns:
        given = [known.get(id(v)) for v in eqn.invars]
        if eqn.primitive.name == "sparse_dense":
            return given
        if "jaxpr" in eqn.params:
            inner = eqn.params["jaxpr"].jaxpr
            found = operands_of_the_product(inner, dict(zip(map(id, inner.invars), given, strict=True)))
            if found is not None:
                return found
    return None


def test_only_the_chosen_layer_is_read():
    """The planes go into the primitive whole: nothing outside it slices or copies them."""
    jaxpr = jax.make_jaxpr(lambda x, layers, i: sparse_dense(x, layers, index=i))(
        CASES[0].x(2), layers(), jnp.int32(1)
    )
    planes = {id(v): v for v in jaxpr.jaxpr.invars}
    given = operands_of_the_product(jaxpr.jaxpr, planes)
    assert sum(v is not None for v in given) == len(jax.tree.leaves(layers())) + 1
