"""What the products compile to on a CPU: one call that reads planes and stacks where they lie."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, stacked

from upg_jax import BackendError, _native, sparse_dense, use_backend

CASE = Case("random", (33, 67), "prime")
ALL = tuple(Case("random", (33, 67), "prime", seed=i) for i in range(3))


@pytest.fixture(autouse=True)
def _native_library(library):
    with use_backend("native"):
        yield


def operations(text: str) -> list[str]:
    """The entry computation's instructions, without those that move no data."""
    entry = text[text.index("ENTRY") :]
    found = re.findall(r"= \S.*? ([a-z][a-z-]*)\(", entry)
    return [f for f in found if f not in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")]


def compiled(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


def test_a_product_is_one_call_and_nothing_else():
    text = compiled(sparse_dense, CASE.x(4), CASE.layer)
    assert operations(text) == ["custom-call"]
    assert f'custom_call_target="{_native.SPARSE_DENSE}"' in text


def test_a_layer_of_a_stack_is_read_in_place():
    text = compiled(lambda x, s, i: sparse_dense(x, s, index=i), CASE.x(4), stacked(*ALL), 1)
    assert sorted(operations(text)) == ["custom-call", "fusion"]  # the fusion clamps the index
    planes = {a.shape for a in jax.tree.leaves(stacked(*ALL))}
    called = re.search(r"operand_layout_constraints=\{(.*?)\}, api", text)[1]
    assert {f"[{','.join(map(str, shape))}]" for shape in planes} <= set(re.findall(r"\[[\d,]*\]", called))


def test_a_scan_over_a_stack_by_index_copies_no_plane():
    square = tuple(Case("random", (67, 67), seed=i) for i in range(3))
    stack = stacked(*square)

    def chain(x, stack):
        return jax.lax.scan(lambda x, i: (sparse_dense(x, stack, index=i), None), x, jnp.arange(3))[0]

    text = compiled(chain, square[0].x(4), stack)
    capacity = stack.capacity
    moved = re.findall(rf"= \w+\[(?:1,|3,)?{capacity}\]\S* (copy|slice|dynamic-slice|fusion)\(", text)
    assert not moved


def test_gradients_and_decoding_call_their_own_kernels():
    def loss(x, layer):
        return (sparse_dense(x, layer) ** 2).sum() + layer.to_dense().sum()

    text = compiled(jax.grad(loss), CASE.x(4), CASE.layer)
    assert _native.DENSE_SPARSE in text
    assert _native.DECODE in compiled(lambda layer: layer.to_dense(), CASE.layer)


def test_operands_of_other_layouts_are_brought_to_row_major():
    x = CASE.x(67)  # (67, 67), so that a missed transposition goes unnoticed by shapes
    y = jax.jit(lambda x, layer: sparse_dense(jnp.matmul(x, x).T, layer).T + 0)(x, CASE.layer)
    with use_backend("reference"):
        expected = jax.jit(lambda x, layer: sparse_dense(jnp.matmul(x, x).T, layer).T + 0)(x, CASE.layer)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("group", [(), (2,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 5), (0,)])
def test_groups_and_batches_of_every_rank(group, batch):
    stack = stacked(*ALL)
    x = CASE.x(*group, *batch)
    index = np.arange(int(np.prod(group))).reshape(group) % 3
    y = np.asarray(jax.jit(sparse_dense)(x, stack, index=jnp.asarray(index)))
    assert y.shape == (*group, *batch, 33)
    x = np.asarray(x)  # whose slices are no programs
    for at in np.ndindex(*group):
        np.testing.assert_array_equal(y[at], sparse_dense(x[at], ALL[index[at]].layer))


def test_an_empty_stack_without_groups_and_a_matrix_without_rows_or_columns():
    for shape in ((0, 5), (5, 0), (0, 0)):
        case = Case("random", shape)
        y, vjp = jax.vjp(lambda x, case=case: sparse_dense(x, case.layer), case.x(3))
        np.testing.assert_array_equal(y, np.zeros((3, shape[0])))
        np.testing.assert_array_equal(vjp(y)[0], np.zeros((3, shape[1])))
        assert case.layer.to_dense().shape == shape


def test_an_exported_program_names_the_versioned_call():
    x, layer = CASE.x(4), CASE.layer
    with pytest.raises(ValueError, match=r"upg_jax\.sparse_dense\.v2"):
        jax.export.export(jax.jit(lambda x: sparse_dense(x, layer)))(x)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(_native.SPARSE_DENSE)]
    exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, layer)), disabled_checks=allowed)(x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x), sparse_dense(x, layer))


def test_another_platform_gets_the_reference_unless_native_is_forced():
    function = jax.jit(lambda x: sparse_dense(x, CASE.layer))
    with use_backend("auto"):
        text = jax.export.export(function, platforms=["tpu"])(CASE.x(4)).mlir_module()
    assert "upg_jax" not in re.sub(r"#loc.*|loc\(.*?\)", "", text)
    with pytest.raises(BackendError, match="no kernels for the platform"):
        jax.export.export(function, platforms=["cuda"])(CASE.x(4))


def test_float64_is_refused_where_native_is_forced():
    with jax.enable_x64(True), pytest.raises(TypeError, match="float64"):
        sparse_dense(jnp.ones(67, jnp.float64), CASE.layer)


def test_without_jit():
    with jax.disable_jit():
        y = sparse_dense(CASE.x(4), CASE.layer)
        w = CASE.layer.to_dense()
    np.testing.assert_array_equal(y, sparse_dense(CASE.x(4), CASE.layer))
    np.testing.assert_array_equal(w, CASE.layer.to_dense())
