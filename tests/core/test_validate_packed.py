"""One crafted layer per rule of docs/format.md, section 1, that index "mask" and "dense" word differently."""

from __future__ import annotations

import numpy as np
import pytest
from core.test_validate import put

from upg_jax import FormatError, MdCSR, pack, stack, unpack


def mask(**changes) -> MdCSR:
    """Rows [3, 5], [] and [300, 599] of 600 columns, with a filler at 255 and end padding, and a tail."""
    bits = np.zeros((3, 640), bool)
    bits[0, [3, 5]] = True
    bits[2, [255, 300, 555, 599]] = True
    planes = {
        "values": np.array([7, -127, 0, 0, 0, 1, 0, -128, 0, 0, 0, 0], np.int8),
        "delta_indices": np.packbits(bits, axis=1, bitorder="little").reshape(-1),
        "prime_indices": np.array([0, 9999, 0, 0, 0, 5, 0, 1, 0, 0, 0, 0], np.uint16),
        "scales": np.array([0.5, 0, 2.0**-126], np.float32),
        "row_pointers": np.array([0, 4, 4, 8], np.uint32),
    }
    return _edited(planes, changes, shape=(3, 600), index="mask")


def dense(**changes) -> MdCSR:
    """Two rows of 6 columns and 2 entries of padding, and a tail."""
    planes = {
        "values": np.array([0, 3, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], np.int8),
        "delta_indices": np.zeros(0, np.uint8),
        "prime_indices": np.array([0, 9999] + [0] * 18, np.uint16),
        "scales": np.array([0.5, 0], np.float32),
        "row_pointers": np.array([0, 8, 16], np.uint32),
    }
    return _edited(planes, changes, shape=(2, 6), index="dense")


def _edited(planes, changes, **static) -> MdCSR:
    for name, edit in changes.items():
        if callable(edit):
            edit(planes[name])
        else:
            planes[name] = edit
    return MdCSR(**planes, row_alignment=4, **static)


STRUCTURAL = {
    "a mask has whole words": (
        mask(delta_indices=np.zeros(3 * 75, np.uint8)),
        r"uint8 \(240,\); got uint8 \(225,\)",
    ),
    "a mask has uint8": (mask(delta_indices=np.zeros(240, np.int8)), "delta_indices must be uint8"),
    "bits are inside the matrix": (mask(delta_indices=put(235, 1)), "row 2: columns.*in_features 600"),
    "the last bits are inside the matrix": (
        mask(delta_indices=put(79, 128)),
        "row 0: columns.*in_features 600",
    ),
    "bits belong to entries": (
        mask(delta_indices=put(81, 1)),
        "row 1: a row's mask has at most one bit an entry; got 1 bits for 0 entries",
    ),
    "pointers end within the planes of a mask": (mask(row_pointers=put(3, 16)), "end at 16"),
    "dense rows have no columns": (
        dense(delta_indices=np.zeros(20, np.uint8)),
        r"uint8 \(0,\); got uint8 \(20,\)",
    ),
    "dense rows are whole": (dense(row_pointers=put(1, 4)), "row 0: every row must have 8 entries.*got 4"),
    "dense rows end together": (
        dense(row_pointers=put(2, 12)),
        "row 1: every row must have 8 entries.*got 4",
    ),
    "dense rows are there": (dense(row_pointers=put(2, 24)), "end at 24"),
}

FULL = {
    "an entry without a bit is 0": (mask(values=put(3, 1)), "row 0: an entry without a bit.*value 0"),
    "an entry of an unused row is 0": (
        mask(values=put(3, 1), delta_indices=np.zeros(240, np.uint8)),
        "row 0: an entry without a bit.*value 0",
    ),
    "gaps have fillers": (mask(delta_indices=put(slice(191, 192), 0)), "row 2: a gap of over 255 columns"),
    "a bit of value 0 bridges a gap": (mask(values=put(0, 0)), "row 0: an entry of value 0.*got delta 3"),
    "a bridging filler does not end a row": (
        mask(values=put(7, 0), prime_indices=put(7, 0)),
        "row 2: an entry of value 0",
    ),
    "a filler's prime index is 0": (mask(prime_indices=put(6, 1)), "row 2: a filler's prime index must be 0"),
    "prime indices are below 10000": (mask(prime_indices=put(5, 10_000)), "row 2: prime_indices.*got 10000"),
    "the tail of values is zero": (mask(values=put(11, 1)), "values must be zero.*from 8 on"),
    "entries past the last column are 0": (dense(values=put(14, 1)), "row 1: an entry past the last column"),
    "a zero's prime index is 0": (dense(prime_indices=put(8, 1)), "row 1: a filler's prime index must be 0"),
    "dense prime indices are below 10000": (
        dense(prime_indices=put(1, 10_000)),
        "row 0: prime_indices.*below 10000; got 10000",
    ),
    "the tail of dense values is zero": (dense(values=put(17, 1)), "values must be zero.*from 16 on"),
    "the tail of dense primes is zero": (dense(prime_indices=put(17, 1)), "prime_indices must be zero"),
}


@pytest.mark.parametrize("level", ["structural", "full"])
@pytest.mark.parametrize(("layer", "message"), STRUCTURAL.values(), ids=STRUCTURAL)
def test_structural_rule(layer, message, level):
    with pytest.raises(FormatError, match=f"^MdCSR: .*{message}"):
        layer.validate(level)


@pytest.mark.parametrize(("layer", "message"), FULL.values(), ids=FULL)
def test_rule_of_the_full_check(layer, message):
    assert layer.validate() is layer
    with pytest.raises(FormatError, match=f"^MdCSR: .*{message}"):
        layer.validate("full")


@pytest.mark.parametrize("good", [mask, dense])
def test_good_layers_pass_alone_and_in_a_stack(good):
    good().validate("full")
    stack([good(), good()]).validate("full")
    unpack(good()).validate("full")


def test_a_stack_names_the_layer():
    with pytest.raises(FormatError, match=r"^MdCSR, layer 1: row 1: a row's mask has at most one bit"):
        stack([mask(), mask(delta_indices=put(81, 1))]).validate()


def test_every_valid_layer_comes_back_from_a_mask():
    layer = unpack(mask())
    assert layer.delta_indices.tolist() == [3, 2, 0, 0, 255, 45, 255, 44, 0, 0, 0, 0]
    np.testing.assert_array_equal(pack(layer, "mask").delta_indices, mask().delta_indices)
