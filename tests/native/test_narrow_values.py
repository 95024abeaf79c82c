"""Values of 4 and 3 bits in compiled kernels, for every instruction set: bits, bounds, stacks, and any content."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from native.test_products import check
from oracle.mdcsr import decode_layer

from upg_jax import BackendError, MdCSR, pack, sparse_dense, stack
from upg_jax._pack import choose_index

# Rows of less than a word and a group, of a word and a half, of more than the 1024 columns that are read at a time.
SHAPES = ((1, 1), (3, 40), (35, 160), (5, 1111))
COUNTS = (1, 3, 8, 9, 20)
FORMS = [*itertools.product((4, 3), ("mask", "dense"), (32, 128))]
each_form = pytest.mark.parametrize(("bits", "index", "group_size"), FORMS)


def layer_of(shape, bits, index, group_size, seed=0) -> MdCSR:
    rng = np.random.default_rng((seed, *shape))
    w = rng.standard_normal(shape).astype(np.float32)
    w[1::5] = 0  # empty rows
    mask = rng.random(shape) < 0.4
    mask[2::5] = True  # full rows
    return MdCSR.from_dense(w, mask=mask, value_bits=bits, group_size=group_size, index=index)


@each_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_bits_equal_the_oracle(shape, bits, index, group_size, kernels):
    layer = layer_of(shape, bits, index, group_size)
    np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), decode_layer(layer))
    rounded = decode_layer(layer).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(layer.to_dense(jnp.bfloat16)), rounded)


@pytest.mark.parametrize(("bits", "index"), [(4, "mask"), (3, "dense")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_both_products(count, shape, bits, index, kernels):
    layer = layer_of(shape, bits, index, 64)
    rng = np.random.default_rng(count)
    x, g = (jnp.asarray(rng.standard_normal((count, n)), jnp.float32) for n in reversed(shape))
    check(layer, x, g)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype, kernels):
    layer = layer_of((35, 160), 4, "mask", 32)
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, n)), dtype) for n in (160, 35))
    check(layer, x, g, dtype)


@each_form
def test_groups_of_vectors_choose_their_layer(bits, index, group_size, kernels):
    stacked = stack([layer_of((7, 150), bits, index, group_size, seed) for seed in range(3)])
    dense = decode_layer(stacked)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 150)), jnp.float32)
    chosen = jnp.array([2, 0, 1, 2])
    y = jax.jit(lambda x: sparse_dense(x, stacked, index=chosen))(x)
    w = dense[np.asarray(chosen)]
    assert_within_bound(y, lambda x, w: np.einsum("gni,goi->gno", x, w), x, w, terms=152)


@each_form
def test_any_content_is_safe_and_means_what_the_format_says(bits, index, group_size, kernels):
    rows, columns, entries = 9, 300, 400
    for seed in range(4):
        rng = np.random.default_rng(seed)
        mask = rng.integers(0, 256, rows * 40) & rng.integers(0, 256, rows * 40)
        layer = MdCSR(
            values=jax.device_put(rng.integers(-128, 128, entries * bits // 8).astype(np.int8)),
            delta_indices=jax.device_put((mask if index == "mask" else mask[:0]).astype(np.uint8)),
            group_scales=jax.device_put(
                rng.integers(0, 256, rows * -(-columns // group_size)).astype(np.uint8)
            ),
            scales=jax.device_put(rng.uniform(0.5, 2, rows).astype(np.float32)),
            row_pointers=jax.device_put(
                np.concatenate([[0], np.sort(rng.integers(0, entries + 1, rows))]).astype(np.uint32)
            ),
            shape=(rows, columns),
            row_alignment=8,
            index=index,
            value_bits=bits,
            group_size=group_size,
        )
        np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), decode_layer(layer))
        x = jax.device_put(rng.standard_normal((2, columns)).astype(np.float32))
        levels = decode_layer(dataclasses.replace(layer, scales=jnp.ones(rows)))
        y = sparse_dense(x, layer)
        assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, levels, layer.scales, terms=columns + 4)
        wild = jax.device_put(rng.integers(0, 2**32, rows + 1).astype(np.uint32))
        assert sparse_dense(x, dataclasses.replace(layer, row_pointers=wild)).shape == (2, rows)


def test_deltas_have_no_kernel_and_pack_says_what_has(kernels):
    layer = layer_of((7, 150), 4, "delta8", 32)
    with pytest.raises(BackendError, match=r"no compiled kernel with index 'delta8'; upg_jax\.pack"):
        sparse_dense(jnp.ones(150), layer)
    assert choose_index(layer)[0] == "mask"
    np.testing.assert_allclose(
        sparse_dense(jnp.ones(150), pack(layer)), decode_layer(layer).sum(1), rtol=1e-4, atol=1e-4
    )
