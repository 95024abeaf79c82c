"""Decoding to dense: the oracle's bits from every instruction set, and linear in the scales under every transform."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, gaps_matrix, stacked
from jax.test_util import check_grads
from oracle.mdcsr import decode_layer, primes

from upg_jax import MdCSR, use_backend

CASES = [
    Case("random", (33, 67), "prime", "bfloat16", 8),
    Case("empty_rows", (33, 67), "unit"),
    Case("full", (5, 300), "prime"),
    Case("zero", (3, 5)),
    Case("random", (0, 5)),
    *(Case("empty_rows", (33, 67), "prime", "bfloat16", 8, index=index) for index in ("mask", "dense")),
    *(Case("random", (5, 1111), index=index) for index in ("mask", "dense")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_equal_the_oracle(case, kernels):
    np.testing.assert_array_equal(np.asarray(case.layer.to_dense(np.float32)), decode_layer(case.layer))


@pytest.mark.parametrize("leaves", [False, True], ids=["whole rows", "rows that leave the matrix"])
def test_every_prime_index_names_its_prime_and_those_beyond_the_table_its_last(leaves, kernels):
    """Entries before one outside the matrix are read one at a time, others eight at a time."""
    inside = 4 if leaves else 8
    k = np.arange(1 << 16).reshape(-1, inside)
    deltas = np.tile(np.array([0, 1, 1, 1, 255, 0, 0, 0] if leaves else [0, *[1] * 7], np.uint8), (len(k), 1))
    layer = MdCSR(
        values=np.tile(np.array([1, -1, 127, -128, 1, 1, 1, 1], np.int8), len(k)),
        delta_indices=deltas.reshape(-1),
        prime_indices=np.pad(k, ((0, 0), (0, 8 - inside))).astype(np.uint16).reshape(-1),
        scales=np.ones(len(k), np.float32),
        row_pointers=np.arange(0, 8 * len(k) + 1, 8, dtype=np.uint32),
        shape=(len(k), inside),
    )
    expected = layer.values.reshape(-1, 8)[:, :inside] * np.asarray(primes())[np.minimum(k, 9_999)]
    np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), expected.astype(np.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_is_the_float32_result_rounded_once(case, kernels):
    found = np.asarray(case.layer.to_dense(jnp.bfloat16))
    np.testing.assert_array_equal(found, decode_layer(case.layer).astype(jnp.bfloat16))


def test_bfloat16_keeps_what_is_not_finite(kernels):
    layer = dataclasses.replace(
        Case("full", (3, 20)).layer, scales=np.array([np.nan, np.inf, 3e38], np.float32)
    )
    found, exact = (
        np.asarray(layer.to_dense(dtype)).astype(np.float32) for dtype in (jnp.bfloat16, np.float32)
    )
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16).astype(np.float32))
    assert np.isnan(found[0]).all()


def test_bfloat16_under_transforms(kernels):
    layers = stacked(Case(), Case("full_row"), Case("empty_rows"))
    expected = decode_layer(layers).astype(jnp.bfloat16)
    decode = functools.partial(MdCSR.to_dense, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(decode(layers)), expected)
    np.testing.assert_array_equal(np.asarray(jax.vmap(decode)(layers)), expected)
    # In small integers, which bfloat16 and the sums hold exactly.
    layer = dataclasses.replace(layers, values=jnp.clip(layers.values, -3, 3))
    gradient = jax.grad(lambda s: decode(dataclasses.replace(layer, scales=s)).astype(jnp.float32).sum())(
        layer.scales
    )
    levels = decode_layer(dataclasses.replace(layer, scales=np.ones_like(layer.scales)))
    np.testing.assert_array_equal(np.asarray(gradient), levels.sum(-1))


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_long_gaps(manifold, kernels):
    layer = MdCSR.from_dense(gaps_matrix(), manifold=manifold)
    np.testing.assert_array_equal(np.asarray(layer.to_dense()), decode_layer(layer))


def test_a_stack_and_a_mapped_stack(kernels):
    cases = (Case(), Case("full_row"), Case("empty_rows"))
    layers = stacked(*cases)
    expected = decode_layer(layers)
    np.testing.assert_array_equal(np.asarray(layers.to_dense()), expected)
    np.testing.assert_array_equal(np.asarray(jax.vmap(MdCSR.to_dense)(layers)), expected)
    pairs = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), layers)
    np.testing.assert_array_equal(np.asarray(jax.vmap(MdCSR.to_dense)(pairs)), [expected, expected[::-1]])


@pytest.mark.parametrize("backend_name", ["native", pytest.param("reference", marks=pytest.mark.slow)])
def test_derivatives_reach_the_scales(backend_name, library):
    case = Case("random", (7, 13))

    def decode(scales):
        return dataclasses.replace(case.layer, scales=scales).to_dense()

    with use_backend(backend_name):
        check_grads(decode, (case.layer.scales,), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)
        many = jnp.stack([case.layer.scales, 2 * case.layer.scales])
        np.testing.assert_array_equal(jax.vmap(decode)(many), jnp.stack([decode(many[0]), decode(many[1])]))
        jacobian = jax.jacrev(decode)(case.layer.scales)
        np.testing.assert_array_equal(jacobian, jax.jacfwd(decode)(case.layer.scales))
        np.testing.assert_array_equal(jnp.einsum("rcr->rc", jacobian), case.levels.astype(np.float32))
