"""`stack`: one leading axis, planes padded to a common length, equal metadata only."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.layers import Case
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, stack


def layers(manifold="unit", shape=(33, 67), **kwargs):
    names = ("random", "full", "zero", "empty_rows")
    return [Case(name, shape, manifold, **kwargs).layer for name in names]


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("row_alignment", [1, 8])
def test_every_layer_of_a_stack_decodes_as_it_did_alone(manifold, row_alignment):
    parts = layers(manifold, row_alignment=row_alignment)
    stacked = stack(parts).validate("full")
    assert stacked.stack_size == 4
    assert stacked.capacity == max(a.capacity for a in parts)
    np.testing.assert_array_equal(decode_layer(stacked), np.stack([decode_layer(a) for a in parts]))
    for i, part in enumerate(parts):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked).validate("full")
        np.testing.assert_array_equal(decode_layer(one), decode_layer(part))


def test_padding_counts_in_bits_per_weight():
    full, zero = Case("full", (33, 67)).layer, Case("zero", (33, 67)).layer
    assert stack([full, zero]).bits_per_weight == full.bits_per_weight
    assert stack([full, zero]).true_nnz == full.true_nnz


def test_host_layers_stay_on_the_host():
    parts = [jax.tree.map(np.asarray, a) for a in layers()]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stack(parts)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stack(layers())))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_layers_without_entries_stack(shape):
    stacked = stack([Case("zero", shape).layer] * 2).validate("full")
    assert stacked.capacity == 0
    assert stacked.scales.shape == (2, shape[0])


def test_stacking_under_jit_equals_stacking_outside():
    parts = [Case("random", (5, 7), seed=s).layer for s in range(2)]
    inside, outside = jax.jit(lambda a, b: stack([a, b]))(*parts), stack(parts)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least one layer; got none"):
        stack([])


def test_a_stack_is_not_stacked_again():
    parts = layers()
    with pytest.raises(ValueError, match="needs unstacked layers; layer 1 is"):
        stack([parts[0], stack(parts)])


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("shape", Case("random", (67, 33))),
        ("row_alignment", Case(row_alignment=4)),
        ("manifold", Case(manifold="prime")),
    ],
)
def test_layers_of_other_metadata_are_refused_by_field(field, other):
    with pytest.raises(ValueError, match=f"equal metadata; {field} is .* in layer 0 and .* in layer 1"):
        stack([Case().layer, other.layer])


def test_layers_of_other_original_dtype_are_refused():
    half = MdCSR.from_dense(np.ones((33, 67), np.float16))
    with pytest.raises(ValueError, match="dtype is 'float32' in layer 0 and 'float16' in layer 1"):
        stack([Case().layer, half])
