"""`partition` and `combine`: what a gradient exists for, apart from what it does not."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case

from upg_jax import combine, partition, sparse_dense

LAYER = Case("random", (5, 7), "prime").layer


def test_scales_are_the_only_trainable_plane():
    params, rest = partition(LAYER)
    assert params.scales is LAYER.scales
    assert params.values is params.delta_indices is params.prime_indices is params.row_pointers is None
    assert rest.scales is None
    assert rest.values is LAYER.values
    assert params.shape == rest.shape == LAYER.shape


def test_a_tree_is_split_by_dtype_and_joined_again():
    tree = {
        "layer": LAYER,
        "norm": jnp.ones(3, jnp.bfloat16),
        "bias": np.zeros(2, np.float32),
        "ids": jnp.arange(3),
        "key": jax.random.key(0),
        "eps": 1e-6,
        "none": None,
        "complex": jnp.ones(1, jnp.complex64),
    }
    params, rest = partition(tree)
    trainable = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert trainable == {"['layer'].scales", "['norm']", "['bias']", "['complex']"}
    joined = combine(params, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True):
        assert a is b


def test_gradients_come_back_in_the_structure_of_the_parameters():
    params, rest = partition({"w": LAYER, "b": jnp.ones(5)})
    x = Case("random", (5, 7)).x(3)

    @jax.jit
    @jax.grad
    def gradient(p):
        tree = combine(p, rest)
        return sparse_dense(x, tree["w"], tree["b"]).sum()

    grads = gradient(params)
    chex.assert_trees_all_equal_structs(grads, params)
    updated = combine(jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, grads), rest)
    assert updated["w"].validate("structural").manifold == "prime"
    np.testing.assert_array_equal(grads["b"], np.full(5, 3, np.float32))


def test_a_whole_layer_has_no_gradient():
    with pytest.raises(TypeError, match="real- or complex-valued inputs"):
        jax.grad(lambda layer: sparse_dense(jnp.ones(7), layer).sum())(LAYER)


def test_parts_that_overlap_are_refused_by_path():
    params, _ = partition({"w": LAYER})
    with pytest.raises(ValueError, match=r"both parts have a leaf at \['w'\]\.scales"):
        combine(params, {"w": LAYER})


def test_parts_of_other_structure_are_refused():
    params, rest = partition({"w": LAYER})
    with pytest.raises(ValueError):
        combine(params, rest["w"])
