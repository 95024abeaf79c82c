"""Rules of the format for values of 4 and 3 bits, on a layer made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from core.test_validate import put
from helpers.layers import Case
from oracle import mdcsr as oracle

from upg_jax import FormatError, MdCSR
from upg_jax._validate import validate
from upg_jax._values import pack_values


def by_hand(**changes) -> MdCSR:
    """Rows [3, 5] and [300, 599] of 600 columns, with a filler at 255 and 510, in groups of 128, and a tail."""
    planes = {
        "values": pack_values(np.array([7, -7, 0, 1, 0, -8, 0, 0], np.int8), 4),
        "delta_indices": np.array([3, 2, 255, 45, 255, 44, 0, 0], np.uint8),
        "scales": np.array([0.5, 2.0**-126], np.float32),
        "row_pointers": np.array([0, 2, 6], np.uint32),
        "group_scales": np.arange(1, 11).astype(np.uint8),
    }
    static = {"shape": (2, 600), "row_alignment": 2, "value_bits": 4, "group_size": 128}
    for name, edit in changes.items():
        if name in static:
            static[name] = edit
        elif callable(edit):
            edit(planes[name])
        else:
            planes[name] = edit
    return MdCSR(**planes, **static)


def test_a_layer_made_by_hand_decodes_as_the_format_says():
    w = np.zeros((2, 600), np.float32)
    w[0, [3, 5]] = np.array([7 * 1, -7 * 1]) * 0.5
    w[1, [300, 599]] = np.array([1 * (6 + 2), -8 * (6 + 4)]) * 2.0**-126
    layer = by_hand().validate("full")
    np.testing.assert_array_equal(np.asarray(layer.to_dense()), w)
    np.testing.assert_array_equal(oracle.decode_layer(layer), w)


STRUCTURAL = {
    "bits that nobody knows": (by_hand(value_bits=5), "value_bits 8, 4, 3; got 'delta8' with 5"),
    "groups of another size": (
        by_hand(group_size=100),
        "group_size must be 32 or 64 or 128 with value_bits 4",
    ),
    "8 bits have no groups": (
        dataclasses.replace(Case().layer, group_size=64),
        "group_size must be None with value_bits 8",
    ),
    "multipliers are there": (
        by_hand(group_scales=None),
        "group_scales must be there with value_bits 4 or 3",
    ),
    "8 bits have no multipliers": (
        dataclasses.replace(Case().layer, group_scales=np.ones(99, np.uint8)),
        "and only then; got value_bits 8",
    ),
    "the prime manifold has 8 bits": (
        dataclasses.replace(by_hand(), prime_indices=np.zeros(8, np.uint16)),
        "the prime manifold has value_bits 8; got 4",
    ),
    "rows are whole bytes": (by_hand(row_alignment=1), "row_alignment must be at least 2 with value_bits 4"),
    "pointers are whole bytes": (
        by_hand(row_pointers=put(1, 3)),
        "row 1: row_pointers must be multiples of row_alignment 2; got 3",
    ),
    "every group has a multiplier": (
        by_hand(group_scales=np.ones(9, np.uint8)),
        r"group_scales must be uint8 \(10,\); got uint8 \(9,\)",
    ),
    "multipliers are uint8": (by_hand(group_scales=np.ones(10, np.int8)), "group_scales must be uint8"),
    "deltas are as many as values": (
        by_hand(delta_indices=np.zeros(4, np.uint8)),
        r"delta_indices must be uint8 \(8,\)",
    ),
    "pointers end within the planes": (
        by_hand(row_pointers=put(2, 10)),
        "end at 10, past the planes' length 8",
    ),
    "columns are inside": (by_hand(delta_indices=put(5, 90)), "row 1: columns must stay below"),
}
FULL = {
    "multipliers are not 0": (
        by_hand(group_scales=put(6, 0)),
        "row 1: group_scales must be 1 to 255; that of group 1 is 0",
    ),
    "the tail is zero": (
        by_hand(values=put(3, 0x10)),
        "values must be zero past the last row's entries, from 6",
    ),
    "a filler has delta 255": (
        by_hand(values=put(0, 0x07)),
        "row 0: an entry of value 0 must have delta 255",
    ),
}


@pytest.mark.parametrize("rule", STRUCTURAL)
def test_structural_rules(rule):
    layer, said = STRUCTURAL[rule]
    with pytest.raises(FormatError, match=said):
        validate(layer)


@pytest.mark.parametrize("rule", FULL)
def test_rules_of_the_full_check(rule):
    layer, said = FULL[rule]
    validate(layer)
    with pytest.raises(FormatError, match=said):
        validate(layer, "full")
