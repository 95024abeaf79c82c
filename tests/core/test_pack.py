"""`pack` and `unpack`: every form holds the same matrix, and the planes come back bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, gaps_matrix
from hypothesis import given
from hypothesis import strategies as st
from oracle.mdcsr import columns_of, decode_layer

from upg_jax import FormatError, MdCSR, _index, _native, pack, sparse_dense, stack, unpack, use_backend
from upg_jax._encode import encode_dense
from upg_jax._native import _conversion
from upg_jax._pack import choose_index

PACKED = ("mask", "dense")
PLANES = ("values", "delta_indices", "prime_indices", "scales", "row_pointers")


@pytest.fixture(params=["compiled", "shared", "numpy"])
def conversions(request, monkeypatch):
    """Runs a test with the compiled conversions, on one thread and on several, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(_native, "load", lambda: None)
    elif _native.load() is None:
        pytest.skip(f"no native library: {_native.unavailable_reason()}")
    elif request.param == "shared":
        monkeypatch.setattr(_conversion, "_WEIGHTS_OF_A_THREAD", 1)
        monkeypatch.setattr(_conversion, "_usable_cores", lambda: 3)


def assert_same_bits(a: MdCSR, b: MdCSR) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)  # statics, too
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(left) is type(right)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("index", PACKED)
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("row_alignment", [1, 8])
@pytest.mark.parametrize("structure", ["random", "full", "empty_rows", "full_row", "last_column", "zero"])
def test_every_structure_comes_back(structure, row_alignment, manifold, index, conversions):
    layer = Case(structure, (33, 67), manifold, "bfloat16", row_alignment).layer
    packed = pack(layer, index).validate("full")
    assert packed.index == index
    assert_same_bits(unpack(packed), layer)
    np.testing.assert_array_equal(decode_layer(packed), decode_layer(layer))
    other = pack(packed, PACKED[index == "mask"])
    assert_same_bits(other, pack(layer, other.index))


@pytest.mark.parametrize("index", PACKED)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1), (2, 64), (2, 65), (3, 63)], ids=str)
def test_edge_sizes_come_back(shape, index, conversions):
    layer = Case("full", shape).layer
    packed = pack(layer, index).validate("full")
    assert_same_bits(unpack(packed), layer)
    assert packed.to_dense().shape == shape


@pytest.mark.parametrize("index", PACKED)
@pytest.mark.parametrize("chunk", [1, 300, 1 << 22, None])
def test_fillers_come_back_in_chunks_of_any_size(index, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(_native, "load", lambda: None)
        monkeypatch.setattr(_index, "_CHUNK_ENTRIES", chunk)
    w = gaps_matrix()[:, :2000]
    layer = jax.tree.map(np.asarray, MdCSR.from_dense(w, manifold="prime", row_alignment=2))
    packed = pack(layer, index).validate("full")
    assert_same_bits(unpack(packed), layer)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_random_layers_come_back(seed, compiled):
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(_native, "load", lambda: None)
        check_random_layers(np.random.default_rng(seed))


def check_random_layers(rng):
    shape = rng.integers(0, 20), rng.integers(0, 700)
    w = (rng.standard_normal(shape) * (rng.random(shape) < rng.choice([0.002, 0.1, 0.9]))).astype(np.float32)
    alignment = int(rng.choice([1, 2, 16]))
    settings = {"row_alignment": alignment, "manifold": str(rng.choice(["unit", "prime"]))}
    capacity = encode_dense(w, **settings).capacity + alignment * int(rng.integers(0, 3))
    layer = encode_dense(w, capacity=capacity, **settings)
    for index in PACKED:
        packed = pack(layer, index).validate("full")
        assert packed.true_nnz == layer.true_nnz
        assert_same_bits(unpack(packed), layer)


def test_a_mask_has_a_bit_for_each_entry_but_end_padding():
    w = np.zeros((2, 600), np.float32)
    w[0, [0, 5, 64]] = 1
    w[1, 500] = 1
    layer = pack(MdCSR.from_dense(w, row_alignment=4), "mask")
    bits = np.unpackbits(np.asarray(layer.delta_indices), bitorder="little").reshape(2, 640)
    assert [np.flatnonzero(row).tolist() for row in bits] == [[0, 5, 64], [255, 500]]
    assert layer.row_pointers.tolist() == [0, 4, 8]
    assert layer.values.tolist() == [127, 127, 127, 0, 0, 127, 0, 0]


def test_dense_rows_can_be_viewed_as_a_matrix():
    w = np.linspace(-1, 1, 3 * 67, dtype=np.float32).reshape(3, 67)
    layer = MdCSR.from_dense(w, index="dense")
    levels = np.asarray(layer.values).reshape(3, 67)
    np.testing.assert_array_equal(levels * np.asarray(layer.scales)[:, None], decode_layer(layer))
    assert layer.delta_indices.shape == (0,)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", PACKED)
@pytest.mark.parametrize("shape", [(33, 670), (3, 670), (2, 5)], ids=str)
def test_encoding_into_a_form_equals_packing_into_it(shape, index, manifold):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    options = {"density": 0.1, "manifold": manifold, "row_alignment": 4}
    layer = MdCSR.from_dense(w, **options, index=index)
    assert_same_bits(layer, pack(MdCSR.from_dense(w, **options), index))
    longer = MdCSR.from_dense(w, **options, index=index, capacity=layer.capacity + 8)
    assert longer.validate("full").capacity == layer.capacity + 8


def test_a_mask_shares_every_other_plane():
    layer = Case("random", (33, 67), "prime").layer
    for host in (False, True):
        original = jax.tree.map(np.asarray, layer) if host else layer
        packed = pack(original, "mask")
        for plane in ("values", "prime_indices", "scales", "row_pointers"):
            assert getattr(packed, plane) is getattr(original, plane)
        assert isinstance(packed.delta_indices, np.ndarray if host else jax.Array)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", PACKED)
def test_stacks_come_back_and_equal_the_stack_of_packed_layers(index, manifold, conversions):
    parts = [Case(kind, (33, 67), manifold).layer for kind in ("random", "full", "zero")]
    for tail in (0, 5):
        stacked = stack(parts)
        if tail:
            wider = Case("full", (33, 67), manifold).layer
            longest = MdCSR.from_dense(wider.to_dense(), manifold=manifold, capacity=wider.capacity + tail)
            stacked = jax.tree.map(lambda leaf: leaf[:3], stack([*parts, longest]))
        packed = pack(stacked, index).validate("full")
        assert packed.stack_size == 3
        assert_same_bits(unpack(packed), stacked)
        np.testing.assert_array_equal(decode_layer(packed), decode_layer(stacked))
    assert_same_bits(pack(stack(parts), index), stack([pack(part, index) for part in parts]))


def test_layers_of_different_forms_do_not_stack():
    layer = Case().layer
    with pytest.raises(ValueError, match="index is 'delta8' in layer 0 and 'mask' in layer 1"):
        stack([layer, pack(layer, "mask")])


def test_a_packed_layer_is_a_different_program_and_an_argument_like_any_other():
    traced = []

    @jax.jit
    def f(x, layer):
        traced.append(layer.index)
        return sparse_dense(x, layer)

    layer = Case().layer
    x = Case().x(2)
    with use_backend("reference"):
        results = [f(x, a) for a in (layer, pack(layer, "mask"), pack(layer, "dense"), layer)]
    assert traced == ["delta8", "mask", "dense"]
    for y in results[1:]:
        np.testing.assert_allclose(y, results[0], rtol=1e-4, atol=1e-4)


def test_sizes_and_repr_say_the_form():
    layer = MdCSR.from_dense(np.ones((64, 64), np.float32), density=0.5)
    mask = pack(layer, "mask")
    assert mask.nbytes == layer.nbytes - layer.capacity + 64 * 8
    assert mask.bits_per_weight == 8 * 0.5 + 1 + 64 / 64 + 32 / 64**2
    assert (
        repr(mask)
        == "MdCSR(64x64, 2,048 entries (50.0%), unit manifold, float32, index mask, 6.01 bits per weight)"
    )
    assert (mask.density, mask.true_nnz, mask.nnz) == (0.5, 2048, 2048)


def broken(**planes) -> MdCSR:
    """Row 0 has columns 3 and 258, behind a filler; row 1 has two entries of end padding."""
    good = {
        "values": np.array([7, 0, 1, 0, 0, 0], np.int8),
        "delta_indices": np.array([3, 255, 0, 0, 0, 0], np.uint8),
        "scales": np.ones(2, np.float32),
        "row_pointers": np.array([0, 4, 6], np.uint32),
    }
    good["delta_indices"] = np.array([3, 255, 1, 0, 0, 0], np.uint8)
    return MdCSR(**(good | planes), shape=(2, 300))


@pytest.mark.parametrize("index", PACKED)
def test_two_entries_on_one_column_are_refused(index, conversions):
    layer = broken(delta_indices=np.array([3, 255, 0, 0, 0, 0], np.uint8))
    with pytest.raises(
        FormatError, match="pack: row 0: each column must have one entry; two share column 258"
    ):
        pack(layer, index)
    with pytest.raises(FormatError, match="later column"):
        layer.validate("full")
    with pytest.raises(FormatError, match="pack: layer 1: row 0"):
        pack(stack([broken(row_pointers=np.array([0, 3, 3], np.uint32)), layer]), index)


def test_a_tail_that_is_not_zero_is_refused(conversions):
    layer = broken(row_pointers=np.array([0, 3, 3], np.uint32))
    deltas = dataclasses.replace(layer, delta_indices=np.array([3, 255, 1, 0, 0, 9], np.uint8))
    with pytest.raises(FormatError, match="delta_indices must be zero past the last row"):
        pack(deltas, "mask")
    with pytest.raises(FormatError, match="delta_indices would come back otherwise"):
        pack(deltas, "dense")
    values = dataclasses.replace(layer, values=np.array([7, 0, 1, 0, 0, 9], np.int8))
    with pytest.raises(FormatError, match="planes must be zero past the last row"):
        pack(values, "dense")


def test_padding_beyond_the_alignment_comes_back_from_a_mask_and_is_refused_for_dense_rows(conversions):
    layer = broken()
    assert_same_bits(unpack(pack(layer, "mask")), layer)
    with pytest.raises(FormatError, match="as the encoder makes them"):
        pack(layer, "dense")


@pytest.mark.parametrize(
    "planes",
    [
        {"deltas": [3, 254, 1]},
        {"values": [7, 1, 0], "deltas": [3, 1, 255]},
        {"primes": [1, 5, 1]},
    ],
    ids=["a zero that is no filler", "a filler at the end", "a filler's prime"],
)
def test_entries_that_would_not_come_back_are_refused_for_dense_rows(planes, conversions):
    layer = broken(row_pointers=np.array([0, 3, 3], np.uint32))
    layer = dataclasses.replace(
        layer,
        values=np.array([*planes.get("values", [7, 0, 1]), 0, 0, 0], np.int8),
        delta_indices=np.array([*planes.get("deltas", [3, 255, 1]), 0, 0, 0], np.uint8),
        prime_indices=np.array([*planes["primes"], 0, 0, 0], np.uint16) if "primes" in planes else None,
    )
    with pytest.raises(FormatError, match="pack: "):
        pack(layer, "dense")


def test_more_weights_than_a_layer_holds_entries_are_refused_for_dense_rows(conversions):
    """Before two billion bytes are made of an empty matrix, with row pointers that wrap around."""
    shape = (1 << 16, 1 << 16)
    empty = MdCSR(
        values=np.zeros(0, np.int8),
        delta_indices=np.zeros(0, np.uint8),
        scales=np.zeros(shape[0], np.float32),
        row_pointers=np.zeros(shape[0] + 1, np.uint32),
        shape=shape,
    )
    with pytest.raises(FormatError, match=r"fewer than 2\*\*31 entries, .* 65,536 x 65,536"):
        pack(empty, "dense")


def test_what_a_layer_in_delta8_cannot_hold_is_refused_on_the_way_back(conversions):
    mask = pack(MdCSR.from_dense(np.ones((2, 300), np.float32)), "mask")
    far = np.zeros((2, 40), np.uint8)
    far[1, 37] = 1
    with pytest.raises(FormatError, match="row 1: a gap of over 255 columns"):
        unpack(dataclasses.replace(mask, delta_indices=jnp.asarray(far.reshape(-1))))
    with pytest.raises(FormatError, match="row 0: a row's mask has at most one bit an entry"):
        unpack(dataclasses.replace(mask, row_pointers=jnp.asarray(np.array([0, 9, 600], np.uint32))))


def test_several_threads_name_the_first_row_that_a_form_cannot_hold(conversions):
    layer = Case("random", (50, 300)).layer
    pointers = np.asarray(layer.row_pointers)
    deltas = np.array(layer.delta_indices)
    for row in (45, 20, 30):
        deltas[pointers[row] + 1] = 0  # a second entry on the first one's column
    with pytest.raises(FormatError, match="row 20: each column must have one entry"):
        pack(dataclasses.replace(layer, delta_indices=jnp.asarray(deltas)), "mask")


def test_the_form_is_chosen_by_density_and_kernels_and_says_why():
    library = _native.load()
    if library is None:
        pytest.skip(f"no native library: {_native.unavailable_reason()}")
    w = np.ones((32, 64), np.float32)
    for kernels in library.usable_kernels:
        # Without VBMI2, expanding a mask takes longer than reading a byte for every column.
        fifth, half = ("mask", "mask") if kernels == "avx512vbmi2" else ("delta8", "dense")
        for density, index in ((0.1, "delta8"), (0.2, fifth), (0.5, half), (0.7, "dense"), (1.0, "dense")):
            layer = MdCSR.from_dense(w, density=density)
            for form in (layer, pack(layer, "mask"), pack(layer, "dense")):
                with library.use_kernels(kernels):
                    chosen, reason = choose_index(form)
                    assert chosen == index
                    assert reason == f"{index} is fastest at density {density:.2f} with the {kernels} kernels"
                    assert pack(form).index == index
    prime = MdCSR.from_dense(w, manifold="prime")
    assert choose_index(prime)[0] == choose_index(pack(prime, "mask"))[0] == "delta8"
    with use_backend("reference"):
        assert pack(layer) is layer
        assert "pure JAX" in choose_index(layer)[1]


def test_layers_keep_deltas_where_a_gpu_will_read_them(monkeypatch):
    layer = MdCSR.from_dense(np.ones((32, 64), np.float32), density=0.5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_index(layer) == ("delta8", "the CUDA kernels read deltas")
    assert pack(layer) is layer


def test_arguments_are_checked():
    layer = Case().layer
    assert pack(layer, "delta8") is layer
    with pytest.raises(ValueError, match=r"index must be one of.*got 'bitmap'"):
        pack(layer, "bitmap")
    with pytest.raises(ValueError, match="needs concrete arrays"):
        jax.jit(lambda a: pack(a, "mask"))(layer)


def test_the_oracle_reads_the_forms_apart():
    assert columns_of(0, [3, 0], [0, 2], (1, 9), "delta8") == [3, 3]
    assert columns_of(1, [0] * 8 + [5, 1] + [0] * 6, [0, 0, 3], (2, 9), "mask") == [0, 2, 8]
    assert columns_of(0, [], [0, 2], (1, 9), "dense") == [0, 1]
