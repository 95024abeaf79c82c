"""One crafted layer per rule of docs/format.md, section 1."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers.layers import Case, gaps_matrix

from upg_jax import FormatError, MdCSR, _index, stack
from upg_jax._validate import validate


def good(**changes) -> MdCSR:
    """Three rows of 600 columns, [3, 5], [] and [300, 599], with fillers of both kinds and a tail."""
    planes = {
        "values": np.array([7, -127, 0, 0, 0, 1, 0, -128, 0, 0, 0, 0], np.int8),
        "delta_indices": np.array([3, 2, 0, 0, 255, 45, 255, 44, 0, 0, 0, 0], np.uint8),
        "prime_indices": np.array([0, 9999, 0, 0, 0, 5, 0, 1, 0, 0, 0, 0], np.uint16),
        "scales": np.array([0.5, 0, 2.0**-126], np.float32),
        "row_pointers": np.array([0, 4, 4, 8], np.uint32),
    }
    for name, edit in changes.items():
        if not callable(edit):
            planes[name] = edit
        else:
            planes[name] = planes[name].copy()
            edit(planes[name])
    static = {"shape": (3, 600), "row_alignment": 4, "dtype": "bfloat16"}
    return MdCSR(**{**static, **planes})


def put(at, value):
    def edit(plane):
        plane[at] = value

    return edit


FLT_MAX = float(np.finfo(np.float32).max)

STRUCTURAL = {
    "shape is two numbers": (good(shape=(3, 600, 1)), "shape must be two"),
    "shape is not negative": (good(shape=(-3, 600)), "shape must be two"),
    "shape is integers": (good(shape=(3.0, 600)), "shape must be two"),
    "shape fits int32": (good(shape=(3, 2**31)), r"below 2\*\*31"),
    "row_alignment is a power of two": (good(row_alignment=3), "power of two.*got 3"),
    "row_alignment is positive": (good(row_alignment=0), "power of two"),
    "row_alignment is an integer": (good(row_alignment=4.0), "power of two"),
    "row_alignment is not absurd": (good(row_alignment=2**40), "power of two"),
    "dtype is known": (good(dtype="int4"), "dtype must be one of.*'int4'"),
    "index encoding is known": (good(index="delta4"), "'delta4'.*upgrade"),
    "value bits are known": (good(value_bits=5), "value_bits 8, 4, 3; got.*5"),
    "values are int8": (good(values=np.zeros(12, np.uint8)), r"values must be int8 \(12,\); got uint8"),
    "values have one axis": (good(values=np.zeros((1, 1, 12), np.int8)), "values must be int8"),
    "deltas are uint8": (good(delta_indices=np.zeros(12, np.int8)), "delta_indices must be uint8"),
    "deltas are as long as values": (good(delta_indices=np.zeros(11, np.uint8)), r"delta_indices.*\(11,\)"),
    "prime indices are uint16": (good(prime_indices=np.zeros(12, np.int16)), "prime_indices must be uint16"),
    "prime indices are as long": (good(prime_indices=np.zeros(13, np.uint16)), r"prime_indices.*\(13,\)"),
    "scales are float32": (good(scales=np.zeros(3, np.float64)), "scales must be float32"),
    "one scale a row": (good(scales=np.zeros(1, np.float32)), r"scales must be float32 \(3,\); got.*\(1,\)"),
    "pointers are uint32": (good(row_pointers=np.zeros(4, np.int64)), "row_pointers must be uint32"),
    "one pointer more than rows": (good(row_pointers=np.zeros(3, np.uint32)), r"row_pointers.*\(4,\)"),
    "plane length is aligned": (
        good(values=np.zeros(10, np.int8), delta_indices=np.zeros(10, np.uint8), prime_indices=None),
        "plane length 10 must be a multiple of row_alignment 4",
    ),
    "pointers start at 0": (good(row_pointers=put(0, 4)), "row_pointers must start at 0; got 4"),
    "pointers do not decrease": (
        good(row_pointers=put(1, 8)),
        "row 1: row_pointers must not decrease; got 8 then 4",
    ),
    "pointers end within the planes": (
        good(row_pointers=put(3, 16)),
        "end at 16, past the planes' length 12",
    ),
    "pointers do not wrap": (good(row_pointers=put(3, 2**32 - 4)), "end at 4294967292"),
    "pointers are aligned": (
        good(row_pointers=put(slice(1, 3), 2)),
        "row 1.*multiples of row_alignment 4; got 2",
    ),
    "columns stay inside": (good(delta_indices=put(7, 45)), "row 2.*in_features 600.*column 600"),
    "fillers stay inside": (
        good(delta_indices=put(slice(4, 8), 255), values=put(slice(4, 8), 0)),
        "row 2.*column 1020",
    ),
    "a matrix without columns has no entries": (good(shape=(3, 0)), "row 0.*in_features 0"),
}

FULL = {
    "columns increase strictly": (good(delta_indices=put(1, 0)), "row 0: columns.*strictly increase"),
    "columns increase across fillers": (
        good(values=put(6, 3), delta_indices=put(6, 0)),
        "row 2: columns.*strictly increase",
    ),
    "a filler's delta is 0 or 255": (
        good(delta_indices=put(4, 254)),
        "row 2.*value 0 must have delta 255.*got delta 254",
    ),
    "padding is at the row's end": (good(delta_indices=put(6, 0)), "row 2.*value 0.*got delta 0"),
    "a bridging filler leads to a weight": (good(delta_indices=put(2, 255)), "row 0.*stored weight after it"),
    "a bridging filler does not end a row": (
        good(values=put(7, 0), delta_indices=put(7, 255), prime_indices=put(7, 0), shape=(3, 1000)),
        "row 2.*stored weight after it",
    ),
    "prime indices are below 10000": (
        good(prime_indices=put(5, 10_000)),
        "row 2: prime_indices.*below 10000; got 10000",
    ),
    "a filler's prime index is 0": (good(prime_indices=put(6, 1)), "row 2: a filler's prime index must be 0"),
    "scales are not NaN": (good(scales=put(1, np.nan)), "row 1: scales.*got nan"),
    "scales are finite": (good(scales=put(1, np.inf)), "row 1: scales.*got inf"),
    "scales are not negative": (good(scales=put(1, -1)), "row 1: scales.*got -1"),
    "scales are not subnormal": (good(scales=put(1, 1e-40)), "row 1: scales"),
    "scales leave room for the largest level": (good(scales=put(1, FLT_MAX / 13405311)), "row 1: scales"),
    "the tail of values is zero": (good(values=put(11, 1)), "values must be zero.*from 8 on"),
    "the tail of deltas is zero": (good(delta_indices=put(8, 1)), "delta_indices must be zero"),
    "the tail of prime indices is zero": (good(prime_indices=put(9, 1)), "prime_indices must be zero"),
}


@pytest.mark.parametrize("level", ["structural", "full"])
@pytest.mark.parametrize(("layer", "message"), STRUCTURAL.values(), ids=STRUCTURAL)
def test_structural_rule(layer, message, level):
    with pytest.raises(FormatError, match=rf"^a\.upg, w: .*{message}"):
        validate(layer, level, where="a.upg, w")


@pytest.mark.parametrize(("layer", "message"), FULL.values(), ids=FULL)
def test_rule_of_the_full_check(layer, message):
    assert layer.validate() is layer
    with pytest.raises(FormatError, match=f"^MdCSR: .*{message}"):
        layer.validate("full")


@pytest.mark.parametrize("as_jax", [False, True])
def test_a_good_layer_passes_with_numpy_and_jax_planes(as_jax):
    layer = good(scales=put(1, FLT_MAX / 13405312))
    layer = jax.tree.map(jax.numpy.asarray, layer) if as_jax else layer
    assert layer.validate("full") is layer


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_rows_are_checked_in_chunks_and_named_by_their_number_in_the_matrix(chunk, monkeypatch):
    monkeypatch.setattr(_index, "_CHUNK_ENTRIES", chunk)
    layer = jax.tree.map(np.array, MdCSR.from_dense(gaps_matrix(), manifold="prime", row_alignment=2))
    layer.validate("full")
    last_row = layer.out_features - 1
    deltas = layer.delta_indices[-2:].copy()
    layer.delta_indices[-2:] = 255
    with pytest.raises(FormatError, match=f"row {last_row}: columns must stay below"):
        layer.validate()
    layer.delta_indices[-2:] = deltas
    layer.prime_indices[int(layer.row_pointers[last_row]) + 3] = 60_000
    with pytest.raises(FormatError, match=f"row {last_row}: prime_indices.*got 60000"):
        layer.validate("full")


def test_the_layer_of_a_stack_is_named():
    bad = good(scales=put(2, np.nan))
    with pytest.raises(FormatError, match=r"^m\.upg, layer 1: row 2: scales"):
        validate(stack([good(), bad, good()]), "full", where="m.upg")
    bad = good(row_pointers=put(1, 8))
    with pytest.raises(FormatError, match=r"^MdCSR, layer 2: row 1: row_pointers"):
        stack([good(), good(), bad]).validate()


def test_a_stack_needs_its_axis_on_every_plane():
    layers = stack([good(), good()])
    with pytest.raises(FormatError, match=r"scales must be float32 \(2, 3\); got float32 \(3,\)"):
        dataclasses.replace(layers, scales=layers.scales[0]).validate()


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="'structural' or 'full'; got 'deep'"):
        good().validate("deep")


@pytest.mark.parametrize(
    "case", [Case("random", (0, 5)), Case("zero", (3, 5), "prime"), Case("full", (3, 1))], ids=str
)
def test_edge_sizes_are_valid(case):
    case.layer.validate("full")
