"""The structural check of columns: the library and NumPy find the same row and say the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from upg_jax import FormatError, MdCSR, _native
from upg_jax._encode import encode_dense


def layer_with(rows: dict[int, list[int]], columns: int) -> MdCSR:
    layer = encode_dense(np.zeros((40, columns), np.float32))
    lengths = [len(rows.get(r, [])) for r in range(40)]
    deltas = np.concatenate([rows.get(r, []) for r in range(40)]).astype(np.uint8)
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    return dataclasses.replace(
        layer, values=np.ones(deltas.size, np.int8), delta_indices=deltas, row_pointers=pointers
    )


@pytest.mark.parametrize("numpy_only", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 15, 31, 32, 33, 100])
def test_the_first_row_outside_is_named(length, numpy_only, kernels, monkeypatch):
    if numpy_only:
        monkeypatch.setattr(_native, "load", lambda: None)
    columns = 255 * length + 1
    inside = layer_with({3: [255] * length, 39: [255] * length}, columns)
    inside.validate()
    for row in (0, 17, 39):
        outside = layer_with({3: [255] * length, row: [1, *[255] * length]}, columns)
        if row == 0:
            outside = layer_with({0: [1, *[255] * length], 3: [1, *[255] * length]}, columns)
        with pytest.raises(FormatError, match=rf"row {row}: columns must stay below .* column {columns}$"):
            outside.validate()


def test_a_stack_is_checked_layer_by_layer(kernels):
    good, bad = layer_with({2: [9]}, 10), layer_with({5: [10]}, 10)
    both = MdCSR(
        **{
            f: np.stack([getattr(a, f) for a in (good, bad)])
            for f in ("values", "delta_indices", "scales", "row_pointers")
        },
        shape=good.shape,
    )
    with pytest.raises(FormatError, match="layer 1: row 5"):
        both.validate()


def test_wrong_arrays_are_refused_before_they_reach_the_library(library):
    with pytest.raises(TypeError, match="uint8"):
        library.first_row_outside(np.zeros(3, np.int8), np.zeros(2, np.uint32), 5)
    with pytest.raises(TypeError, match="row pointer"):
        library.first_row_outside(np.zeros(3, np.uint8), np.zeros(0, np.uint32), 5)
