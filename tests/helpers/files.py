"""Comparing what comes out of a file with what went in, plane by plane, without compiling a decoder."""

from __future__ import annotations

import numpy as np

from upg_jax import MdCSR


def assert_holds(layer: MdCSR, original: MdCSR, index: int | None = None) -> None:
    """Checks that a layer, or layer `index` of a stack, is the original up to the length of its zero tail."""
    for field in ("shape", "row_alignment", "dtype", "manifold", "index", "value_bits"):
        assert getattr(layer, field) == getattr(original, field), field
    for plane in ("values", "delta_indices", "prime_indices", "scales", "row_pointers"):
        expected = getattr(original, plane)
        if expected is None:
            assert getattr(layer, plane) is None
            continue
        got, expected = np.asarray(getattr(layer, plane)), np.asarray(expected)
        got = got if index is None else got[index]
        assert got.dtype == expected.dtype
        if plane not in ("scales", "row_pointers"):
            expected = expected[: original.nnz]
            assert not got[original.nnz :].any(), plane
        np.testing.assert_array_equal(got[: expected.size], expected, err_msg=plane)
