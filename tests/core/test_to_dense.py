"""Decoded weights: the same bits from NumPy, jax eager, jitted, and under vmap."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, gaps_matrix
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, stack

STRUCTURES = [
    Case("full_row", (67, 33), "prime", "bfloat16"),
    Case("zero", (3, 5)),
    Case("random", (0, 5)),
    Case("random", (3, 1), "prime"),
    Case("last_column", (3, 300)),
]


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("case", STRUCTURES, ids=str)
def test_decoded_bits_equal_the_oracle(case):
    np.testing.assert_array_equal(bits(case.layer.to_dense(np.float32)), bits(decode_layer(case.layer)))


@pytest.mark.parametrize("case", [Case(), Case("empty_rows", (33, 67), "prime", row_alignment=8)], ids=str)
def test_decoded_bits_are_the_same_eager_jitted_and_in_vmap(case):
    layer = case.layer
    expected = bits(decode_layer(layer))
    np.testing.assert_array_equal(bits(layer.to_dense(np.float32)), expected)
    np.testing.assert_array_equal(bits(jax.jit(lambda a: a.to_dense(np.float32))(layer)), expected)
    np.testing.assert_array_equal(bits(jax.jit(lambda: layer.to_dense(np.float32))()), expected)
    layers = stack([layer, layer])
    decoded = jax.jit(jax.vmap(functools.partial(MdCSR.to_dense, dtype=np.float32)))(layers)
    np.testing.assert_array_equal(bits(decoded), np.stack([expected, expected]))
    np.testing.assert_array_equal(bits(layers.to_dense(np.float32)), np.stack([expected, expected]))


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_layers_with_long_gaps_decode_to_the_oracles_bits(manifold):
    layer = MdCSR.from_dense(gaps_matrix(), manifold=manifold)
    np.testing.assert_array_equal(bits(layer.to_dense()), bits(decode_layer(layer)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_dtypes_round_the_float32_weight_once(dtype):
    case = Case("random", (33, 67), "prime")
    np.testing.assert_array_equal(
        bits(case.layer.to_dense(dtype)), bits(decode_layer(case.layer).astype(jnp.dtype(dtype)))
    )


def test_host_layers_decode_without_passing_through_a_constructor():
    case = Case()
    on_host = jax.tree.map(np.asarray, case.layer)
    np.testing.assert_array_equal(bits(on_host.to_dense()), bits(decode_layer(case.layer)))


def test_gradient_of_a_decoded_matrix_reaches_the_scales():
    case = Case("random", (5, 7), "prime")
    ct = case.rng.integers(-4, 5, case.shape).astype(np.float32)

    def loss(scales):
        return (dataclasses.replace(case.layer, scales=scales).to_dense(np.float32) * ct).sum()

    gradient = jax.grad(loss)(case.layer.scales)
    expected = (case.levels * ct).sum(axis=1)
    np.testing.assert_allclose(gradient, expected, rtol=7 * 2.0**-23, atol=7 * 2.0**-23 * 4 * 13_300_583)


def test_spmv_is_the_product_with_one_vector():
    case = Case()
    v = case.x()
    np.testing.assert_array_equal(case.layer.spmv(v), case.layer.spmv(np.asarray(v)))
    with pytest.raises(AssertionError, match="rank"):
        case.layer.spmv(case.x(2))


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool"])
def test_a_dtype_that_holds_no_weights_is_refused(dtype):
    with pytest.raises(TypeError, match="floating-point"):
        Case("random", (3, 5)).layer.to_dense(dtype)
