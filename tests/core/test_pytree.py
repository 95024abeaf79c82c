"""`MdCSR` as a value in JAX and Python: a pytree, picklable, printable, without needless retraces."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case

from upg_jax import MdCSR, sparse_dense, stack

UNIT, PRIME = Case("random", (5, 7)), Case("random", (5, 7), "prime", "bfloat16", row_alignment=4)
PLANES = ["values", "delta_indices", "scales", "row_pointers", "prime_indices"]


def assert_same_layer(actual: MdCSR, expected: MdCSR) -> None:
    assert isinstance(actual, MdCSR)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_trees_all_equal_dtypes(actual, expected)


def test_leaves_have_the_planes_names_as_key_paths():
    def names(layer):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)]

    assert names(PRIME.layer) == [f".{plane}" for plane in PLANES]
    assert names(UNIT.layer) == [f".{plane}" for plane in PLANES[:-1]]


@pytest.mark.parametrize("case", [UNIT, PRIME], ids=str)
def test_tree_map_keeps_the_static_metadata(case):
    assert_same_layer(jax.tree.map(lambda leaf: leaf, case.layer), case.layer)
    shapes = jax.eval_shape(lambda a: a, case.layer)
    assert (shapes.shape, shapes.dtype, shapes.manifold) == (case.shape, case.dtype, case.manifold)


def test_layers_of_other_metadata_are_other_trees():
    for field, value in (("shape", (5, 8)), ("row_alignment", 2), ("dtype", "float16"), ("value_bits", 4)):
        other = dataclasses.replace(UNIT.layer, **{field: value})
        assert jax.tree.structure(other) != jax.tree.structure(UNIT.layer)


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNIT.layer.scales = None


@pytest.mark.parametrize("case", [UNIT, PRIME], ids=str)
@pytest.mark.parametrize("on_host", [False, True])
def test_pickle_and_deepcopy_give_an_equal_layer(case, on_host):
    layer = jax.tree.map(np.asarray, case.layer) if on_host else case.layer
    assert layer.true_nnz  # caches a property on the instance
    assert_same_layer(pickle.loads(pickle.dumps(layer)), layer)
    assert_same_layer(copy.deepcopy(layer), layer)
    assert_same_layer(copy.copy(layer), layer)
    assert pickle.loads(pickle.dumps(layer)).true_nnz == layer.true_nnz


def test_a_layer_goes_into_and_comes_out_of_jit():
    assert_same_layer(jax.jit(lambda a: a)(PRIME.layer), PRIME.layer)
    halved = jax.jit(lambda a: dataclasses.replace(a, scales=a.scales / 2))(PRIME.layer)
    assert_same_layer(halved, dataclasses.replace(PRIME.layer, scales=PRIME.layer.scales / 2))


def test_layers_of_one_shape_and_capacity_share_one_trace():
    traces = []

    @jax.jit
    def product(x, layer):
        traces.append(layer.capacity)
        return sparse_dense(x, layer)

    rng = np.random.default_rng(0)
    for density in (0.2, 0.5, 0.9):
        layer = MdCSR.from_dense(rng.standard_normal((5, 7)).astype(np.float32), density=density, capacity=40)
        product(UNIT.x(), layer)
    assert traces == [40]
    product(UNIT.x(), MdCSR.from_dense(rng.standard_normal((5, 7)).astype(np.float32), capacity=48))
    assert traces == [40, 48]


def test_scan_over_a_stack_sees_each_layer_with_its_metadata():
    layers = stack([Case("random", (5, 7), seed=seed, row_alignment=16).layer for seed in range(3)])

    def body(_, layer):
        assert layer.stack_size is None
        assert layer.shape == (5, 7)
        return None, layer.scales.sum()

    sums = jax.jit(lambda s: jax.lax.scan(body, None, s)[1])(layers)
    np.testing.assert_allclose(sums, layers.scales.sum(axis=1), rtol=1e-6)


def test_repr_says_size_entries_manifold_and_bits():
    layer = MdCSR.from_dense(np.eye(4, 1000, dtype=np.float32), manifold="prime")
    assert repr(layer) == "MdCSR(4x1000, 4 entries (0.1%), prime manifold, float32, 0.10 bits per weight)"
    assert repr(stack([layer, layer])).startswith("MdCSR(2 x [4x1000], 8 entries (0.1%), prime manifold")


def test_repr_works_without_values_to_look_at():
    seen = []
    jax.jit(lambda a: seen.append(repr(a)) or a.scales)(PRIME.layer)
    jax.vmap(lambda a: seen.append(repr(a)) or a.scales)(stack([PRIME.layer, PRIME.layer]))
    seen.append(repr(jax.eval_shape(lambda a: a, PRIME.layer)))
    seen.append(repr(jax.tree.map(lambda leaf: None, PRIME.layer)))
    seen.append(repr(jax.tree.map(lambda leaf: 0, PRIME.layer)))
    for text in seen:
        assert text.startswith("MdCSR(shape=(5, 7), ")
        assert "bfloat16" in text
    assert "int8[" in seen[0]


def test_numpy_memory_maps_may_be_leaves(tmp_path):
    paths = {}
    for plane in PLANES:
        paths[plane] = tmp_path / f"{plane}.npy"
        np.save(paths[plane], np.asarray(getattr(PRIME.layer, plane)))
    mapped = dataclasses.replace(PRIME.layer, **{p: np.load(f, mmap_mode="r") for p, f in paths.items()})
    mapped.validate("full")
    assert repr(mapped) == repr(PRIME.layer)
    x = PRIME.x(3)
    np.testing.assert_array_equal(sparse_dense(x, mapped), sparse_dense(x, PRIME.layer))


def test_sizes_of_a_stack_are_sums_over_its_layers():
    layers = [Case("random", (5, 7), seed=seed).layer for seed in range(3)]
    stacked = stack(layers)
    assert stacked.stack_size == 3
    assert stacked.shape == (5, 7)
    assert stacked.nnz == sum(a.nnz for a in layers)
    assert stacked.true_nnz == sum(a.true_nnz for a in layers)
    assert stacked.density == stacked.true_nnz / (3 * 35)
    assert stacked.bits_per_weight == 8 * stacked.nbytes / (3 * 35)
    assert jnp.shape(stacked.to_dense()) == (3, 5, 7)


def test_a_donated_layer_can_still_be_printed():
    layer = jax.tree.map(jnp.array, Case("random", (5, 7)).layer)  # a copy: cases are shared between tests
    jax.tree.map(lambda leaf: leaf.delete(), layer)
    assert "values=int8[" in repr(layer)
