"""vmap over the layers of a stack and over `index`: one call, no plane copied per example."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked

from upg_jax import sparse_dense


@functools.cache
def parts(manifold: str, row_alignment: int = 1) -> list[Case]:
    kinds = ("random", "full_row", "zero", "random")
    return [Case(k, (7, 13), manifold, "float32", row_alignment, seed) for seed, k in enumerate(kinds)]


def weights(cases) -> np.ndarray:
    return np.stack([case.weight for case in cases])


def terms(cases) -> int:
    return max(case.terms for case in cases)


@pytest.mark.parametrize(("manifold", "row_alignment"), [("unit", 8), ("prime", 1)])
@pytest.mark.parametrize("x_mapped", [False, True])
def test_vmap_over_stacked_layers(manifold, row_alignment, x_mapped, backend):
    cases = parts(manifold, row_alignment)
    x = cases[0].x(4, 2) if x_mapped else cases[0].x(2)
    mapped = jax.vmap(sparse_dense, (0 if x_mapped else None, 0))
    y = jax.jit(mapped)(x, stacked(*cases))
    assert_within_bound(y, lambda x, w: x @ np.swapaxes(w, 1, 2), x, weights(cases), terms=terms(cases))
    assert str(jax.make_jaxpr(mapped)(x, stacked(*cases))).count("sparse_dense[") == 1


@pytest.mark.parametrize("axis", [1, -1])
def test_vmap_over_layers_stacked_on_another_axis(axis, one_backend):
    cases = parts("prime")
    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), stacked(*cases))
    x = cases[0].x(2)
    y = jax.vmap(sparse_dense, (None, axis))(x, layers)
    np.testing.assert_array_equal(y, jax.vmap(sparse_dense, (None, 0))(x, stacked(*cases)))


def test_vmap_over_layers_and_bias(one_backend):
    cases = parts("unit")
    x, bias = cases[0].x(2), cases[0].cotangent(4)
    y = jax.vmap(sparse_dense, (None, 0, 0))(x, stacked(*cases), bias)
    assert_within_bound(
        y,
        lambda x, w, b: x @ np.swapaxes(w, 1, 2) + b[:, None, :],
        *(x, weights(cases), bias),
        terms=terms(cases),
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_vmap_over_layers_without_rows_or_columns(shape, backend):
    case = Case("zero", shape)
    y = jax.vmap(sparse_dense, (None, 0))(case.x(2), stacked(*[case] * 3))
    np.testing.assert_array_equal(y, np.zeros((3, 2, shape[0]), np.float32))


def test_vmap_over_no_layers(backend):
    none = jax.tree.map(lambda leaf: leaf[:0], stacked(*parts("prime")))
    y = jax.vmap(sparse_dense, (None, 0))(parts("prime")[0].x(2), none)
    assert y.shape == (0, 2, 7)


@pytest.mark.parametrize("x_mapped", [False, True])
def test_vmap_over_index_is_one_call(x_mapped, one_backend):
    cases = parts("prime")
    layers, index = stacked(*cases), jnp.array([3, 0, 3])
    x = cases[0].x(3, 2) if x_mapped else cases[0].x(2)
    mapped = jax.vmap(lambda x, i: sparse_dense(x, layers, index=i), (0 if x_mapped else None, 0))
    y = mapped(x, index)
    chosen = weights(cases)[np.array([3, 0, 3])]
    assert_within_bound(y, lambda x, w: x @ np.swapaxes(w, 1, 2), x, chosen, terms=terms(cases))
    assert str(jax.make_jaxpr(mapped)(x, index)).count("sparse_dense[") == 1


def test_vmap_over_x_with_one_index(one_backend):
    cases = parts("unit")
    layers = stacked(*cases)
    x = cases[0].x(3, 2)
    y = jax.vmap(lambda x: sparse_dense(x, layers, index=1))(x)
    np.testing.assert_array_equal(y, sparse_dense(x, layers, index=1))


def test_vmap_over_x_behind_an_array_of_indices(one_backend):
    cases = parts("unit")
    layers, index = stacked(*cases), jnp.array([2, 1])
    x = cases[0].x(3, 2, 5)
    y = jax.vmap(lambda x: sparse_dense(x, layers, index=index))(x)
    expected = jnp.stack([sparse_dense(xs, layers, index=index) for xs in x])
    np.testing.assert_array_equal(y, expected)


def test_nested_vmaps_over_layers_and_index(one_backend):
    cases = parts("prime")
    groups = [stacked(*cases[:2]), stacked(*cases[2:])]
    capacity = max(g.capacity for g in groups)
    padded = [
        jax.tree.map(
            lambda a: jnp.pad(a, ((0, 0), (0, capacity - a.shape[1]))) if a.dtype.itemsize < 4 else a, g
        )
        for g in groups
    ]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
    x, index = cases[0].x(2), jnp.array([1, 0, 1])

    def choose(i, layers):
        return sparse_dense(x, layers, index=i)

    y = jax.jit(jax.vmap(jax.vmap(choose, (0, None)), (None, 0)))(index, both)
    chosen = weights(cases).reshape(2, 2, 7, 13)[:, np.array(index)]
    assert_within_bound(y, lambda x, w: x @ np.swapaxes(w, 2, 3), x, chosen, terms=terms(cases))
    z = jax.jit(jax.vmap(jax.vmap(lambda layer: sparse_dense(x, layer))))(both)
    chosen = weights(cases).reshape(2, 2, 7, 13)
    assert_within_bound(z, lambda x, w: x @ np.swapaxes(w, 2, 3), x, chosen, terms=terms(cases))


@pytest.mark.parametrize(
    "mapped",
    [{"scales"}, {"scales", "index"}, {"values"}, {"values", "index"}, {"scales", "values"}, {"x", "scales"}],
    ids=lambda names: "+".join(sorted(names)),
)
@pytest.mark.parametrize("group", [(), (3,)], ids=["one index", "index per vector"])
def test_vmap_over_some_planes_of_a_stack(mapped, group, one_backend):
    """A plane that is mapped makes stacks of stacks; scales alone do not."""
    layers = stacked(*parts("prime"))
    rng = np.random.default_rng(5)
    flipped = jnp.stack([layers.values, -layers.values])
    whole = {
        "x": parts("prime")[0].x(2, 3),
        "scales": jnp.asarray(rng.uniform(0.5, 1.5, (2, 4, 7)).astype(np.float32)),
        "values": flipped,
        "index": jnp.asarray(rng.integers(0, 4, (2, *group)).astype(np.int32)),
    }
    operands = {name: array if name in mapped else array[0] for name, array in whole.items()}

    def apply(operands):
        planes = {"scales": operands["scales"], "values": operands["values"]}
        layer = dataclasses.replace(layers, **planes)
        return sparse_dense(operands["x"], layer, index=operands["index"])

    axes = ({name: 0 if name in mapped else None for name in operands},)
    y = jax.jit(jax.vmap(apply, axes))(operands)
    one = jax.jit(apply)
    expected = [one({n: a[i] if n in mapped else a for n, a in operands.items()}) for i in range(2)]
    # The sums are taken in the same order; only where the scale is multiplied differs.
    np.testing.assert_allclose(y, np.stack(expected), rtol=2.0**-22)


def test_vmap_over_scales_with_a_layer_for_each_group_of_several_vectors(one_backend):
    cases = parts("prime")
    layer, chosen = stacked(*cases), np.array([2, 0, 3])
    scales = np.random.default_rng(0).uniform(0.5, 1.5, (2, 4, 7)).astype(np.float32)
    x = cases[0].x(3, 2)
    over_scales = jax.vmap(lambda s: sparse_dense(x, dataclasses.replace(layer, scales=s), index=chosen))
    assert_within_bound(
        jax.jit(over_scales)(scales),
        lambda x, w, s: np.einsum("gni,goi,bgo->bgno", x, w, s),
        *(x, np.stack([case.levels for case in cases])[chosen], scales[:, chosen]),
        terms=terms(cases),
    )
