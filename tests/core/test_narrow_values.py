"""Values of 4 and 3 bits with multipliers for groups: the encoder, every form of a layer, and wrong arguments."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from core.test_pack import assert_same_bits
from helpers.bounds import assert_within_bound
from helpers.layers import matrix
from hypothesis import given
from hypothesis import strategies as st
from oracle import mdcsr as oracle

from upg_jax import (
    EncodingError,
    MdCSR,
    TrainableMdCSR,
    pack,
    sparse_dense,
    stack,
    unpack,
    use_backend,
)
from upg_jax._encode import encode_dense
from upg_jax._pack import choose_index
from upg_jax._quantize_groups import choose_multipliers
from upg_jax._validate import validate
from upg_jax._values import pack_values, unpack_values

BITS = (4, 3)
INDEXES = ("delta8", "mask", "dense")
LARGEST = {4: 7, 3: 3}


def narrow(structure="random", shape=(33, 131), bits=4, **options) -> MdCSR:
    w = matrix(structure, shape, np.random.default_rng(5))
    return MdCSR.from_dense(w, value_bits=bits, group_size=options.pop("group_size", 32), **options)


@given(st.integers(0, 2**32 - 1), st.sampled_from(BITS))
def test_a_stream_of_values_is_what_the_format_says(seed, bits):
    rng = np.random.default_rng(seed)
    entries = int(rng.integers(0, 40)) * (2 if bits == 4 else 8)
    q = rng.integers(-LARGEST[bits] - 1, LARGEST[bits] + 1, entries).astype(np.int8)
    stream = pack_values(q, bits)
    assert oracle.values_of(stream, bits) == q.tolist()
    np.testing.assert_array_equal(unpack_values(stream, bits), q)


@pytest.mark.parametrize("bits", BITS)
def test_long_streams_are_converted_in_parts(bits, monkeypatch):
    q = np.random.default_rng(0).integers(-3, 4, (2, 8 * 37)).astype(np.int8)
    stream = pack_values(q, bits)
    monkeypatch.setattr("upg_jax._values._CHUNK_OCTETS", 5)
    np.testing.assert_array_equal(pack_values(q, bits), stream)
    np.testing.assert_array_equal(unpack_values(stream, bits), q)


def test_two_values_of_4_bits_share_a_byte_the_first_in_its_low_half():
    assert pack_values(np.array([1, -2, 7, 0], np.int8), 4).view(np.uint8).tolist() == [0xE1, 0x07]


def encoded_by_hand(w: np.ndarray, bits: int, size: int):
    """One row's levels and scale, as docs/format.md words it."""
    largest = LARGEST[bits]
    scale = np.float32(np.abs(w).max()) / np.float32(255 * largest)
    levels = np.zeros(w.size)
    for start in range(0, w.size, size):
        targets = (w[start : start + size] / scale).astype(np.float32)
        best = None
        for n in range(20, 9, -1):
            ideal = np.float32(np.abs(targets).max() / np.float32(largest)) * np.float32(n / 20)
            m = min(max(np.rint(ideal), 1), 255)
            q = np.clip(np.rint(targets / np.float32(m)), -largest, largest)
            error = ((targets - q * m).astype(np.float64) ** 2).sum()
            if best is None or error < best[0]:
                best = error, q * m
        levels[start : start + size] = best[1]
    return levels, scale


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_encoder_takes_the_multipliers_that_the_format_names(bits, group_size, rng):
    w = (rng.standard_normal((6, 300)) * rng.lognormal(0, 1, (6, 1))).astype(np.float32)
    w *= np.repeat(rng.lognormal(0, 1.5, (6, 10)), 30, axis=1).astype(np.float32)
    layer = MdCSR.from_dense(w, value_bits=bits, group_size=group_size)
    unscaled = oracle.decode_layer(dataclasses.replace(layer, scales=np.ones(6, np.float32)))
    for row in range(6):
        levels, scale = encoded_by_hand(w[row], bits, group_size)
        assert layer.scales[row] == scale
        np.testing.assert_array_equal(unscaled[row], levels)


def test_of_equally_good_multipliers_the_first_is_taken():
    # 3 makes 9, 3, 3, 3 of them and 2 makes 6, 2, 2, 2: squared errors of 4, both.
    assert choose_multipliers(np.array([8, 2, 2, 2], np.float32), 3, np) == 3


@st.composite
def sparse_matrices(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(0, 5)), draw(st.integers(0, 700))
    w = rng.standard_normal(shape) * (rng.random(shape) < draw(st.sampled_from([0.002, 0.2, 0.9])))
    w *= draw(st.sampled_from([1.0, 1e-38, 1e30]))
    return w.astype(draw(st.sampled_from([np.float32, ml_dtypes.bfloat16])))


@given(
    w=sparse_matrices(),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([None, 32, 64, 128]),
    index=st.sampled_from(INDEXES),
    row_alignment=st.sampled_from([None, 8, 32]),
    extra=st.integers(0, 2),
)
def test_encoded_layers_are_valid_and_near(w, bits, group_size, index, row_alignment, extra):
    options = {"value_bits": bits, "group_size": group_size, "index": index, "row_alignment": row_alignment}
    tight = encode_dense(w, **options)
    layer = encode_dense(w, capacity=tight.nnz + extra * tight.row_alignment, **options)
    validate(layer, "full")
    assert layer.group_size == (group_size or 64)
    assert layer.true_nnz == tight.true_nnz
    assert layer.capacity == tight.nnz + extra * tight.row_alignment
    decoded = oracle.decode_layer(layer).astype(np.float64)
    assert layer.true_nnz == np.count_nonzero(decoded)
    # No group is further off than with the multiplier that its largest weight asks for: half a level of that for
    # each weight, or what rounding the multiplier clips.
    w = w.astype(np.float64)
    scales = layer.scales.astype(np.float64)
    for start in range(0, w.shape[1], layer.group_size):
        part = np.where(scales[:, None] > 0, w, 0)[:, start : start + layer.group_size]
        ideal = np.abs(part).max(axis=1, initial=0) / LARGEST[bits]
        step = np.maximum((ideal + scales) / 2, LARGEST[bits] * scales)
        error = np.square(part - np.where(scales[:, None] > 0, decoded, 0)[:, start : start + part.shape[1]])
        assert np.all(error.sum(axis=1) <= 1.001 * (part != 0).sum(axis=1) * step**2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("structure", ["random", "full", "empty_rows", "full_row", "last_column", "zero"])
def test_every_structure_packs_decodes_and_comes_back(structure, index, bits):
    layer = narrow(structure, bits=bits)
    packed = pack(layer, index).validate("full")
    assert packed.index == index
    assert_same_bits(unpack(packed), layer)
    assert_same_bits(packed, narrow(structure, bits=bits, index=index))
    np.testing.assert_array_equal(oracle.decode_layer(packed), oracle.decode_layer(layer))
    if structure == "random":
        np.testing.assert_array_equal(np.asarray(packed.to_dense(np.float32)), oracle.decode_layer(layer))
    if index == "mask":
        assert packed.values is layer.values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 64), (3, 65)], ids=str)
def test_edge_sizes(shape, bits):
    for index in INDEXES:
        layer = narrow("full", shape, bits, index=index).validate("full")
        assert oracle.decode_layer(layer).shape == shape
    np.testing.assert_array_equal(np.asarray(layer.to_dense()), oracle.decode_layer(layer))
    y = sparse_dense(jnp.ones((2, shape[1])), layer)
    np.testing.assert_allclose(y, oracle.decode_layer(layer).sum(1)[None].repeat(2, 0), rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_bits_per_weight_are_what_the_format_says(bits):
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    layer = MdCSR.from_dense(w, density=0.5, value_bits=bits, index="mask")
    of_rows = (32 * 64 + 32 * 65) / w.size
    padding = bits * 8 / 1024
    expected = bits * layer.density + 1 + 8 / 64 + of_rows
    assert expected <= layer.bits_per_weight <= expected + padding
    dense = MdCSR.from_dense(w, value_bits=bits, index="dense")
    assert dense.bits_per_weight == bits + 8 / 64 + of_rows
    assert f"{bits}-bit values in groups of 64" in repr(layer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("index", INDEXES)
def test_stacks_are_padded_read_in_place_and_differentiated(index, bits):
    layers = [narrow(s, bits=bits, index=index) for s in ("random", "empty_rows", "full")]
    stacked = stack(layers).validate("full")
    dense = oracle.decode_layer(stacked).astype(np.float64)
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(dense[i], oracle.decode_layer(layer))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 131)), jnp.float32)
    chosen = jnp.array([2, 0, 1])
    y = jax.jit(lambda x: sparse_dense(x, stacked, index=chosen))(x)
    terms = 131 + 2
    assert_within_bound(y, lambda x, w: np.einsum("ni,noi->no", x, w), x, dense[[2, 0, 1]], terms=terms)
    over_layers = jax.vmap(sparse_dense, (None, 0))(x[0], stacked)
    assert_within_bound(over_layers, lambda x, w: w @ x, x[0], dense, terms=terms)
    back = jax.grad(lambda x: sparse_dense(x, stacked, index=chosen).sum())(x)
    assert_within_bound(back, lambda w: w.sum(1), dense[[2, 0, 1]], terms=terms)


def test_a_gradient_for_the_scales_sees_the_multipliers():
    layer = narrow()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 131)), jnp.float32)
    found = jax.grad(lambda s: sparse_dense(x, dataclasses.replace(layer, scales=s)).sum())(layer.scales)
    levels = oracle.decode_layer(dataclasses.replace(layer, scales=np.ones(33, np.float32)))
    assert_within_bound(found, lambda x, w: (x @ w.T).sum(0), x, levels, terms=131 + 4 + 2)


def test_deltas_run_in_pure_jax():
    layer, x = narrow(), jnp.ones(131)
    np.testing.assert_allclose(sparse_dense(x, layer), oracle.decode_layer(layer).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(
        np.asarray(layer.to_dense(jnp.bfloat16)), oracle.decode_layer(layer).astype(jnp.bfloat16)
    )
    with use_backend("reference"):
        assert choose_index(layer)[0] == "delta8"


@pytest.mark.parametrize("bits", BITS)
def test_training_gives_back_untouched_rows_and_encodes_others_anew(bits):
    layer = narrow(bits=bits, index="mask")
    trainable = TrainableMdCSR.from_layer(layer)
    assert_same_bits(trainable.to_mdcsr(), layer)
    w = np.asarray(layer.to_dense()).copy()
    changed = dataclasses.replace(
        trainable, weights=jnp.where(trainable.positions < 131, 1.25 * trainable.weights, trainable.weights)
    )
    w = np.asarray(changed.to_dense())
    again = changed.to_mdcsr().validate("full")
    assert (again.value_bits, again.group_size, again.index) == (bits, 32, "mask")
    kept = np.asarray(again.to_dense())[1:]
    first_of_tiles = np.arange(1, 33) % -(-33 // trainable.weights.shape[0]) == 0
    np.testing.assert_array_equal(kept[~first_of_tiles], np.asarray(layer.to_dense())[1:][~first_of_tiles])
    np.testing.assert_array_equal(
        again.to_dense()[0], MdCSR.from_dense(w[:1], value_bits=bits, group_size=32).to_dense()[0]
    )
    with pytest.raises(EncodingError, match=f"to_mdcsr: values of {bits} bits are for the unit manifold"):
        changed.to_mdcsr(manifold="prime")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"value_bits": 5}, "value_bits must be one of"),
        ({"value_bits": 4, "group_size": 48}, "group_size must be one of"),
        ({"group_size": 64}, "group_size is for values of 4 or 3 bits"),
        ({"value_bits": 4, "manifold": "prime"}, "4 bits are for the unit manifold; got manifold 'prime'"),
        ({"value_bits": 4, "row_alignment": 1}, "row_alignment must be at least 2 with value_bits 4"),
        ({"value_bits": 3, "row_alignment": 4}, "row_alignment must be at least 8 with value_bits 3"),
        ({"value_bits": 4, "capacity": 7}, "capacity must be a multiple of row_alignment=2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, said):
    with pytest.raises(EncodingError, match=said):
        MdCSR.from_dense(np.ones((2, 3), np.float32), **options)
