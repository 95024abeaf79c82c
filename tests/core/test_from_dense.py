"""Pruning, quantizing and encoding: what is kept, how it is laid out, what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.layers import GAPS, gaps_matrix, matrix
from oracle.mdcsr import decode_layer

from upg_jax import EncodingError, MdCSR, _encode

MANIFOLDS = ("unit", "prime")
SHAPES = ((0, 4), (4, 0), (1, 1), (3, 1), (1, 3), (33, 67), (67, 33), (13, 101))


def test_example_of_the_format_is_stored_as_four_deltas():
    w = np.zeros((1, 16), np.float32)
    w[0, [0, 5, 12, 15]] = [1, -0.5, 0.25, -1]
    layer = MdCSR.from_dense(w)
    np.testing.assert_array_equal(layer.delta_indices, [0, 5, 7, 3])
    np.testing.assert_array_equal(layer.values, [127, -64, 32, -127])
    np.testing.assert_array_equal(layer.row_pointers, [0, 4])
    assert layer.scales[0] == np.float32(1) / np.float32(127)


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("row_alignment", [1, 8])
def test_gaps_up_to_70000_columns_are_bridged_by_fillers(manifold, row_alignment):
    w = gaps_matrix()
    layer = MdCSR.from_dense(w, manifold=manifold, row_alignment=row_alignment).validate("full")
    decoded = decode_layer(layer)
    np.testing.assert_array_equal(decoded != 0, w != 0)
    # The prime manifold's levels contain the unit manifold's (multiples of the largest prime).
    half_level = np.abs(w).max(axis=1, keepdims=True) / 127 / 2
    assert np.all(np.abs(decoded - w) <= half_level * (1 + 2.0**-22))
    lengths = np.diff(np.asarray(layer.row_pointers).astype(np.int64))
    for row, gap in enumerate(GAPS):
        stored = max(gap - 1, 0) // 255 + 1
        stored += stored if gap > 0 and 2 * gap < w.shape[1] else 0
        assert lengths[row] == -(-stored // row_alignment) * row_alignment


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("structure", ["random", "full", "empty_rows", "full_row", "last_column", "zero"])
def test_every_structure_and_size_keeps_exactly_its_nonzero_weights(manifold, shape, structure, rng):
    w = matrix(structure, shape, rng)
    layer = MdCSR.from_dense(w, manifold=manifold, row_alignment=4).validate("full")
    np.testing.assert_array_equal(decode_layer(layer) != 0, w != 0)
    assert layer.true_nnz == np.count_nonzero(w)
    assert layer.shape == shape
    assert layer.manifold == manifold


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(33, 67), (1, 3), (7, 1)])
def test_density_keeps_the_largest_magnitudes_in_exact_number(density, shape, rng):
    w = matrix("full", shape, rng)
    layer = MdCSR.from_dense(w, density=density)
    order = np.argsort(-np.abs(w).ravel(), kind="stable")[: round(density * w.size)]
    expected = np.zeros(w.size, bool)
    expected[order] = True
    np.testing.assert_array_equal(decode_layer(layer) != 0, expected.reshape(shape))
    assert layer.true_nnz == round(density * w.size)
    assert layer.density == layer.true_nnz / w.size


@pytest.mark.parametrize("chunk_weights", [1, 7, 1 << 20])
def test_ties_in_magnitude_are_kept_in_row_major_order_across_chunks(chunk_weights, monkeypatch):
    monkeypatch.setattr(_encode, "_CHUNK_WEIGHTS", chunk_weights)
    w = np.full((6, 5), -0.5, np.float32)
    w[4, 3] = 0.75
    kept = decode_layer(MdCSR.from_dense(w, density=0.5)) != 0
    expected = np.zeros(30, bool)
    expected[:14] = expected[23] = True
    np.testing.assert_array_equal(kept.ravel(), expected)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_encoding_in_chunks_of_rows_does_not_change_the_planes(manifold, monkeypatch, rng):
    w = matrix("random", (33, 67), rng)
    whole = MdCSR.from_dense(w, density=0.3, manifold=manifold, row_alignment=4)
    monkeypatch.setattr(_encode, "_CHUNK_WEIGHTS", 150)
    chunked = MdCSR.from_dense(w, density=0.3, manifold=manifold, row_alignment=4)
    for plane in ("values", "delta_indices", "prime_indices", "scales", "row_pointers"):
        np.testing.assert_array_equal(getattr(whole, plane), getattr(chunked, plane))


def test_density_one_prunes_nothing_but_weights_that_round_to_zero():
    w = np.array([[1, 0.5 / 127 * 0.99, 0.5 / 127 * 1.01, -1e-9]], np.float32)
    layer = MdCSR.from_dense(w, density=1.0)
    np.testing.assert_array_equal(layer.values, [127, 1])
    np.testing.assert_array_equal(layer.delta_indices, [0, 2])


def test_mask_keeps_what_it_says_whatever_the_magnitude(rng):
    w = matrix("full", (33, 67), rng)
    mask = rng.random(w.shape) < 0.4
    layer = MdCSR.from_dense(w, mask=mask)
    np.testing.assert_array_equal(decode_layer(layer) != 0, mask)
    # The scale comes from the kept weights only.
    largest = np.where(mask, np.abs(w), 0).max(axis=1)
    np.testing.assert_array_equal(layer.scales, largest / np.float32(127))


def test_unit_manifold_is_symmetric_int8_rounding(rng):
    w = rng.standard_normal((33, 67)).astype(np.float32)
    layer = MdCSR.from_dense(w)
    scales = np.abs(w).max(axis=1) / np.float32(127)
    q = np.clip(np.rint(w.astype(np.float64) / scales[:, None]), -127, 127)
    np.testing.assert_array_equal(layer.scales, scales)
    np.testing.assert_array_equal(decode_layer(layer), q.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_original_dtype_is_recorded_and_is_the_default_of_to_dense(manifold, dtype, rng):
    w = matrix("random", (5, 7), rng).astype(dtype)
    layer = MdCSR.from_dense(w, manifold=manifold)
    assert layer.dtype == np.dtype(dtype).name
    assert layer.to_dense().dtype == dtype
    assert MdCSR.from_dense(jnp.asarray(w), manifold=manifold).dtype == layer.dtype


def test_float64_is_rounded_to_float32_first():
    w = np.array([[1 + 2.0**-40, 0.5]])
    layer = MdCSR.from_dense(w, manifold="prime")
    assert layer.dtype == "float32"
    assert layer.scales[0] == np.float32(1) / np.float32(127 * 104_729)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_negative_zero_is_no_weight(manifold):
    w = np.array([[-0.0, 1.0], [0.0, -0.0]], np.float32)
    layer = MdCSR.from_dense(w, manifold=manifold).validate("full")
    assert layer.true_nnz == 1
    np.testing.assert_array_equal(layer.row_pointers, [0, 1, 1])


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_subnormal_weights_are_accepted_and_rows_of_them_are_stored_empty(manifold):
    subnormal = np.float32(1e-40)
    w = np.array([[subnormal, 0], [subnormal, 1]], np.float32)
    layer = MdCSR.from_dense(w, manifold=manifold).validate("full")
    np.testing.assert_array_equal(layer.row_pointers, [0, 0, 1])
    assert layer.scales[0] == 0


@pytest.mark.parametrize(("manifold", "divisor"), [("unit", 127), ("prime", 127 * 104_729)])
def test_rows_are_stored_from_the_smallest_scale_without_subnormal_products(manifold, divisor):
    smallest = 2.0**-126 * divisor
    w = np.array([[smallest * 1.01], [smallest * 0.99]], np.float32)
    layer = MdCSR.from_dense(w, manifold=manifold).validate("full")
    np.testing.assert_array_equal(layer.row_pointers, [0, 1, 1])
    assert layer.scales[0] >= 2.0**-126
    assert layer.scales[1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("arguments", [{}, {"density": 0.5}, {"mask": np.zeros((5, 7), bool)}])
def test_nan_and_infinity_are_refused_by_row_and_column(bad, arguments, monkeypatch):
    monkeypatch.setattr(_encode, "_CHUNK_WEIGHTS", 14)
    w = np.ones((5, 7), np.float32)
    w[3, 2] = bad
    with pytest.raises(EncodingError, match=r"got -?(nan|inf) at row 3, column 2"):
        MdCSR.from_dense(w, **arguments)


@pytest.mark.parametrize("density", [None, 0.5])
def test_float64_beyond_float32_is_refused_by_row_and_column(density):
    w = np.ones((2, 3))
    w[1, 2] = -1e300
    with pytest.raises(EncodingError, match=r"got -1e\+300 at row 1, column 2"):
        MdCSR.from_dense(w, density=density)


@pytest.mark.parametrize(("manifold", "largest_level"), [("unit", 127), ("prime", 127 * 104_729)])
def test_a_row_too_large_for_the_format_is_refused_by_number(manifold, largest_level):
    limit = float(np.finfo(np.float32).max) / 13_405_312 * largest_level
    w = np.ones((4, 2), np.float32)
    w[2, 1] = limit * 0.999
    MdCSR.from_dense(w, manifold=manifold).validate("full")
    w[2, 1] = limit * 1.001
    with pytest.raises(EncodingError, match="row 2 has a magnitude of"):
        MdCSR.from_dense(w, manifold=manifold)


@pytest.mark.parametrize(
    ("w", "arguments", "message"),
    [
        (np.ones(3, np.float32), {}, r"must be a matrix .*got shape \(3,\)"),
        (np.ones((2, 2, 2), np.float32), {}, "must be a matrix"),
        (np.ones((2, 2), np.int32), {}, "got int32"),
        (np.ones((2, 2), np.complex64), {}, "got complex64"),
        (np.ones((2, 2), np.float32), {"density": 1.5}, r"density must be in \[0, 1\]; got 1.5"),
        (np.ones((2, 2), np.float32), {"density": -0.1}, "density"),
        (np.ones((2, 2), np.float32), {"density": float("nan")}, "density"),
        (np.ones((2, 2), np.float32), {"mask": np.ones((2, 3), bool)}, r"got bool \(2, 3\)"),
        (np.ones((2, 2), np.float32), {"mask": np.ones((2, 2), np.int8)}, "mask must be boolean"),
        (np.ones((2, 2), np.float32), {"mask": np.ones((2, 2), bool), "density": 0.5}, "density or mask"),
        (np.ones((2, 2), np.float32), {"manifold": "octonion"}, "octonion"),
        (np.ones((2, 2), np.float32), {"row_alignment": 3}, "power of two; got 3"),
        (np.ones((2, 2), np.float32), {"row_alignment": 0}, "power of two; got 0"),
        (np.ones((2, 2), np.float32), {"row_alignment": 2.0}, "power of two; got 2.0"),
        (np.ones((2, 2), np.float32), {"capacity": 3}, "capacity must be .*4 entries .*got 3"),
        (np.ones((2, 2), np.float32), {"capacity": 9, "row_alignment": 2}, "capacity must be a multiple"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(w, arguments, message):
    with pytest.raises(EncodingError, match=message):
        MdCSR.from_dense(w, **arguments)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_capacity_pads_the_planes_with_zeros_and_changes_nothing_else(manifold, rng):
    w = matrix("random", (5, 7), rng)
    tight = MdCSR.from_dense(w, manifold=manifold, row_alignment=4)
    roomy = MdCSR.from_dense(w, manifold=manifold, row_alignment=4, capacity=tight.nnz + 12).validate("full")
    assert roomy.capacity == tight.capacity + 12
    assert roomy.nnz == tight.nnz
    assert roomy.true_nnz == tight.true_nnz
    assert roomy.bits_per_weight > tight.bits_per_weight
    np.testing.assert_array_equal(decode_layer(roomy), decode_layer(tight))


def test_sizes_count_every_byte():
    w = np.zeros((3, 1000), np.float32)
    w[0, [0, 999]] = 1  # three fillers in between: 999 = 3 * 255 + 234
    layer = MdCSR.from_dense(w, manifold="prime", capacity=10)
    assert layer.nnz == 5
    assert layer.true_nnz == 2
    assert layer.density == 2 / 3000
    assert layer.nbytes == 10 * (1 + 1 + 2) + 3 * 4 + 4 * 4
    assert layer.bits_per_weight == 8 * layer.nbytes / 3000
