"""The product itself: every structure, dtype and leading shape against the oracle."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, each_case, gaps_matrix
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, sparse_dense, stack


def product(x, levels, scales):
    return x @ levels.T * scales


def product_and_bias(x, levels, scales, bias):
    return x @ levels.T * scales + bias


@each_case
def test_product_equals_the_oracle(case, backend):
    x = case.x(5)
    y = sparse_dense(x, case.layer)
    assert_within_bound(y, product, x, case.levels, case.scales, terms=case.terms, dtype=case.dtype)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 2, 1), (0,), (2, 0), (0, 3)], ids=str)
def test_leading_dimensions_of_any_number_and_size(lead, backend):
    case = Case("random", (7, 13), "prime")
    x = case.x(*lead)
    y = sparse_dense(x, case.layer)
    assert y.shape == (*lead, 7)
    assert_within_bound(y, product, x, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (0,)], ids=str)
def test_matrices_without_rows_or_columns(shape, lead, backend):
    case = Case("zero", shape)
    y = sparse_dense(case.x(*lead), case.layer, jnp.ones(shape[0]))
    np.testing.assert_array_equal(y, np.ones((*lead, shape[0]), np.float32))


@pytest.mark.parametrize("case", [Case("random", (33, 67), "prime"), Case("zero", (3, 5))], ids=str)
@pytest.mark.parametrize("vectors", [17, 257])
def test_many_vectors(case, vectors, backend):
    x = case.x(vectors)
    y = sparse_dense(x, case.layer)
    assert_within_bound(y, product, x, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_gaps_up_to_70000_columns(manifold, backend):
    layer = MdCSR.from_dense(gaps_matrix(), manifold=manifold, row_alignment=8)
    rng = np.random.default_rng(3)
    x = jax.device_put(rng.standard_normal((2, layer.in_features)).astype(np.float32))
    w = decode_layer(layer)
    terms = int(np.diff(np.asarray(layer.row_pointers).astype(np.int64)).max()) + 2
    assert_within_bound(sparse_dense(x, layer), lambda x, w: x @ w.T, x, w, terms=terms)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias_dtype", ["float32", "x"])
def test_bias_is_added_before_the_one_rounding(dtype, bias_dtype, backend):
    case = Case("random", (7, 13), "unit", dtype)
    x = case.x(3)
    bias = case.cotangent().astype(dtype if bias_dtype == "x" else "float32")
    y = sparse_dense(x, case.layer, bias)
    operands = (x, case.levels, case.scales, bias)
    assert_within_bound(y, product_and_bias, *operands, terms=case.terms, dtype=dtype)


def test_numpy_arguments_are_welcome(backend):
    case = Case("random", (7, 13))
    x, bias = np.asarray(case.x(3)), np.ones(7, np.float32)
    np.testing.assert_array_equal(
        sparse_dense(x, case.layer, bias), sparse_dense(jnp.asarray(x), case.layer, jnp.asarray(bias))
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_inputs_reach_every_row_that_reads_them(bad, backend):
    case = Case("random", (7, 13))
    x = np.array(case.x(2))
    x[1, 4] = bad
    y = np.asarray(sparse_dense(x, case.layer))
    assert np.isfinite(y[0]).all()
    np.testing.assert_array_equal(np.isfinite(y[1]), case.levels[:, 4] == 0)


def test_padded_planes_give_the_same_bits(backend):
    w = np.asarray(Case("random", (7, 13)).layer.to_dense())
    tight = MdCSR.from_dense(w, row_alignment=4)
    roomy = MdCSR.from_dense(w, row_alignment=4, capacity=tight.capacity + 64)
    x = Case("random", (7, 13)).x(3)
    np.testing.assert_array_equal(sparse_dense(x, tight), sparse_dense(x, roomy))


CASE = Case("random", (7, 13))


@pytest.mark.parametrize(
    ("x", "layer", "kwargs", "error", "message"),
    [
        (
            np.ones(13, np.float32),
            np.ones((7, 13)),
            {},
            TypeError,
            "layer must be an upg_jax.MdCSR; got ndarray",
        ),
        (np.ones(13, np.int32), CASE.layer, {}, TypeError, "got int32; use x.astype"),
        (np.ones(13, np.complex64), CASE.layer, {}, TypeError, "got complex64"),
        (np.ones((), np.float32), CASE.layer, {}, ValueError, r"in_features=13\); got shape \(\)"),
        (np.ones((2, 7), np.float32), CASE.layer, {}, ValueError, r"got shape \(2, 7\) for a layer"),
        (np.ones(13, np.float32), CASE.layer, {"bias": np.ones(13, np.float32)}, ValueError, "bias must be"),
        (
            np.ones(13, np.float32),
            CASE.layer,
            {"bias": np.ones((1, 7), np.float32)},
            ValueError,
            "bias must be",
        ),
        (
            np.ones(13, np.float32),
            CASE.layer,
            {"bias": np.ones(7, np.float16)},
            TypeError,
            "or float32; got f",
        ),
        (np.ones(13, np.float32), CASE.layer, {"index": 0}, ValueError, "this layer is a single one"),
        (np.ones(13, np.float32), stack([CASE.layer] * 2), {}, ValueError, "stack of 2 layers needs index="),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, layer, kwargs, error, message):
    with pytest.raises(error, match=f"sparse_dense: .*{message}"):
        sparse_dense(x, layer, **kwargs)


def test_planes_with_further_axes_are_refused():
    layers = stack([CASE.layer] * 2)
    deeper = dataclasses.replace(
        layers, **{p: getattr(layers, p)[None] for p in ("values", "delta_indices", "scales", "row_pointers")}
    )
    with pytest.raises(ValueError, match=r"values of shape \(1, 2, .*use jax.vmap"):
        sparse_dense(CASE.x(), deeper, index=0)
