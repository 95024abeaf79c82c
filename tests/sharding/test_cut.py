"""What `shard` places: blocks that are valid layers and hold exactly their rows or columns, and the way back."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, gaps_matrix, stacked
from helpers.versions import needs
from hypothesis import given
from hypothesis import strategies as st
from oracle.mdcsr import decode_layer

from upg_jax import FormatError, MdCSR, UPGDecompressor, save, shard, stack
from upg_jax._cut import PADDING, even_cut, pieces_in_order, pieces_of, take_columns, take_rows
from upg_jax._mdcsr import PLANES
from upg_jax._sharded import shard_as

pytestmark = needs("shard_map")

BLOCKS = 4


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, BLOCKS), ("data", "model"))


def blocks_of(sharded):
    """Each block, as the devices have it; the devices along the other axis agree."""
    found: dict[int, list] = {}
    for device in sharded.mesh.devices.reshape(-1):
        column = np.argwhere(sharded.mesh.devices == device)[0][1]
        planes = {}
        for plane in PLANES:
            array = getattr(sharded.block, plane)
            if array is not None:
                shards = {s.device: s.data for s in array.addressable_shards}
                planes[plane] = np.asarray(shards[device])
        found.setdefault(column, []).append(dataclasses.replace(sharded.block, **planes))
    for copies in found.values():
        for copy in copies[1:]:
            jax.tree.map(np.testing.assert_array_equal, copy, copies[0])
    return [found[i][0] for i in range(BLOCKS)]


def padded(w, dim, group_size):
    """The matrix with zeros up to equal blocks, of whole groups of columns."""
    axis = -2 if dim == "out" else -1
    missing = -w.shape[axis] % (BLOCKS * (group_size or 1 if dim == "in" else 1))
    return np.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, missing if axis == a else 0) for a in (-2, -1)])


def check(layer, mesh, dim, *, same_bits=True):
    sharded = shard(layer, mesh, "model", dim)
    whole = padded(decode_layer(layer), dim, layer.group_size)
    expected = np.split(whole, BLOCKS, axis=-2 if dim == "out" else -1)
    for block, part in zip(blocks_of(sharded), expected, strict=True):
        block.validate("full")
        assert block.shape == part.shape[-2:]
        np.testing.assert_array_equal(decode_layer(block), part)
    whole = sharded.unshard().validate("full")
    np.testing.assert_array_equal(decode_layer(whole), decode_layer(layer))
    for plane in PLANES if same_bits else ():
        if getattr(layer, plane) is not None:
            of_layer = np.asarray(getattr(layer, plane))
            of_whole = np.asarray(getattr(whole, plane))
            np.testing.assert_array_equal(of_layer[..., : of_whole.shape[-1]], of_whole)
            assert not of_layer[..., of_whole.shape[-1] :].any()
    return sharded


ENCODINGS = [
    Case("random", shape, manifold, row_alignment=alignment, index=index)
    for manifold, index, (shape, alignment) in itertools.product(
        ("unit", "prime"), ("delta8", "mask", "dense"), (((33, 67), 1), ((8, 136), 8))
    )
] + [
    Case("random", (33, 290), row_alignment=8, index=index, value_bits=bits)
    for index, bits in itertools.product(("delta8", "mask", "dense"), (4, 3))
]


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("case", ENCODINGS, ids=str)
def test_blocks_of_every_encoding_are_valid_and_decode_to_the_same_bits(case, dim, mesh):
    check(case.layer, mesh, dim)


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("structure", ["zero", "full_row", "last_column", "empty_rows"])
def test_structures_with_empty_rows_and_columns(structure, dim, mesh):
    check(Case(structure, (33, 67), "prime", row_alignment=4).layer, mesh, dim)


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2), (2, 5), (0, 5), (5, 0)])
def test_fewer_features_than_devices(shape, dim, mesh):
    check(MdCSR.from_dense(np.ones(shape, np.float32)), mesh, dim)


def test_gaps_around_a_cut_get_the_fillers_that_they_need(mesh):
    w = gaps_matrix()
    w = np.concatenate([w, np.zeros((len(w), BLOCKS * w.shape[1] - w.shape[1]), np.float32)], axis=1)
    layer = MdCSR.from_dense(w[:, ::-1], row_alignment=4)
    sharded = check(layer, mesh, "in")
    assert any((np.asarray(block.delta_indices) == 255).any() for block in blocks_of(sharded))


@pytest.mark.parametrize("dim", ["out", "in"])
def test_a_stack_is_cut_layer_by_layer_at_one_capacity(dim, mesh):
    cases = [Case(kind, (9, 21), "prime", row_alignment=2) for kind in ("random", "full", "zero")]
    check(stacked(*cases), mesh, dim)


@pytest.mark.parametrize("dim", ["out", "in"])
def test_planes_may_be_views_of_a_file_and_the_way_back_is_saved_as_it_was(dim, mesh, tmp_path):
    layers = {f"layers.{i}.w": Case("random", (12, 20), "prime", seed=i).layer for i in range(3)}
    save(tmp_path / "model.safetensors", layers)
    with UPGDecompressor.from_safetensors(tmp_path / "model.safetensors") as file:
        sharded = check(file.get_stack(list(layers), device=False), mesh, dim)
        save(tmp_path / "again.safetensors", {"layers.{}.w": sharded.unshard()})
    first, second = (tmp_path / f"{name}.safetensors" for name in ("model", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_equal_entries_beyond_the_format_still_add(mesh):
    """Two entries on one column pass the structural check, and kernels add them."""
    layer = MdCSR(
        values=np.array([3, 4, 5], np.int8),
        delta_indices=np.array([2, 0, 4], np.uint8),
        scales=np.ones(1, np.float32),
        row_pointers=np.array([0, 3], np.uint32),
        shape=(1, 8),
    ).validate()
    blocks = blocks_of(shard(layer, mesh, "model", "in"))
    assert [decode_layer(block).tolist() for block in blocks] == [[[0, 0]], [[7, 0]], [[0, 0]], [[5, 0]]]


@given(
    st.integers(0, 40),
    st.integers(0, 700),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.data(),
)
def test_any_cut_and_the_way_back(rows, columns, blocks, density, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    index = data.draw(st.sampled_from(["delta8", "mask", "dense"]))
    bits = data.draw(st.sampled_from([8, 4, 3]))
    alignment = data.draw(st.sampled_from([None, 8]))
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    layer = MdCSR.from_dense(w, density=density, index=index, row_alignment=alignment, value_bits=bits)
    layer = jax.tree.map(np.asarray, layer)
    for take, size, multiple in ((take_rows, rows, 1), (take_columns, columns, layer.group_size or 1)):
        cut = even_cut(size, blocks, multiple)
        parts = [take(pieces_of(layer, runs), layer) for runs in cut]
        for part in parts:
            part.validate("full")
        whole = take(pieces_in_order(parts, cut), layer)
        jax.tree.map(np.testing.assert_array_equal, whole, layer)


def test_an_even_cut_pads_the_last_blocks():
    assert even_cut(10, 4) == (((0, 3),), ((3, 3),), ((6, 3),), ((9, 1), (PADDING, 2)))
    assert even_cut(2, 4) == (((0, 1),), ((1, 1),), ((PADDING, 1),), ((PADDING, 1),))


def test_shard_holds_about_one_block_besides_what_it_has_placed(mesh):
    layer = jax.tree.map(np.asarray, MdCSR.from_dense(np.ones((64, 1 << 15), np.float32)))
    sharded = shard(layer, mesh, "model")  # compiles what it needs
    jax.block_until_ready(sharded)
    tracemalloc.start()
    try:
        sharded = shard(layer, mesh, "model")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Arrays on the devices of a CPU are either what was made on the host, or copies that are not traced.
    assert peak <= sharded.nbytes + 1.5 * sharded.nbytes / BLOCKS


def test_what_cannot_be_cut_is_refused_by_name(mesh):
    layer = Case("random", (8, 8)).layer
    with pytest.raises(TypeError, match=r"layer must be an upg_jax\.MdCSR; got ndarray"):
        shard(np.ones((8, 8)), mesh, "model")
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's \('data', 'model'\); got 'heads'"):
        shard(layer, mesh, "heads")
    with pytest.raises(ValueError, match=r"dim must be 'out' or 'in'; got 'rows'"):
        shard(layer, mesh, "model", "rows")
    narrow = Case("random", (8, 130), row_alignment=2, value_bits=4).layer
    with pytest.raises(ValueError, match=r"cut between groups of 32.*begin with column 33"):
        shard_as(narrow, mesh, "model", "in", even_cut(130, BLOCKS))
    with pytest.raises(ValueError, match="needs concrete arrays"):
        jax.jit(lambda layer: shard(layer, mesh, "model"))(layer)
    sharded = shard(layer, mesh, "model")
    with pytest.raises(ValueError, match=r"unshard: needs concrete arrays; .* under jit"):
        jax.jit(lambda sharded: sharded.to_dense())(sharded)
    with pytest.raises(TypeError, match=r"layer 1 is a ShardedMdCSR; stack before shard"):
        stack([layer, sharded])


NO_MESHES = {
    "NoneType": lambda: None,
    "int": lambda: 4,
    "str": lambda: "model",
    "list": lambda: jax.devices()[:2],
    "AbstractMesh": lambda: jax.make_mesh((2,), ("model",)).abstract_mesh,
}


@pytest.mark.parametrize("kind", NO_MESHES)
def test_what_is_no_mesh_is_refused_by_name(kind):
    with pytest.raises(
        TypeError, match=rf"shard: mesh must be a jax\.sharding\.Mesh; got {kind}; jax.make_mesh"
    ):
        shard(Case("random", (8, 8)).layer, NO_MESHES[kind](), "model")


@pytest.mark.parametrize("axis", [None, 1, ["model"], ("model",)], ids=str)
def test_what_is_no_name_of_an_axis_is_refused(axis, mesh):
    with pytest.raises(
        TypeError, match=r"shard: axis must be the name of one of the mesh's axes, a str; got"
    ):
        shard(Case("random", (8, 8)).layer, mesh, axis)


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("stacks", [False, True], ids=["layer", "stack"])
def test_planes_that_are_too_short_are_refused(stacks, dim, mesh):
    layer = Case("random", (8, 40), row_alignment=1).layer
    layer = stack([layer, layer]) if stacks else layer
    short = {plane: getattr(layer, plane)[..., :-3] for plane in ("values", "delta_indices")}
    with pytest.raises(FormatError, match=r"shard: delta_indices must be uint8"):
        shard(dataclasses.replace(layer, values=short["values"]), mesh, "model", dim)
    where = "shard, layer 0" if stacks else "shard"
    with pytest.raises(FormatError, match=rf"{where}: row_pointers end at \d+, past the planes' length"):
        shard(dataclasses.replace(layer, **short), mesh, "model", dim)


def test_a_file_takes_whole_layers_alone(mesh, tmp_path):
    sharded = shard(Case("random", (8, 12)).layer, mesh, "model")
    with pytest.raises(
        FormatError, match=r"'w': files hold whole layers; got ShardedMdCSR\(8x12.*unshard\(\)"
    ):
        save(tmp_path / "x.safetensors", {"w": sharded})


def test_a_sharded_layer_is_a_pytree_that_says_what_it_is(mesh):
    layers = stack([Case("random", (8, 12), seed=seed).layer for seed in range(2)])
    sharded = shard(layers, mesh, "model", "in")
    assert repr(sharded) == (
        "ShardedMdCSR(2 x [8x12], in over 'model' in 4 blocks of 8x3, unit manifold, index delta8)"
    )
    doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + jnp.zeros_like(leaf), s))(sharded)
    assert doubled.cut == sharded.cut
    assert (sharded.stack_size, sharded.num_weights, sharded.out_features) == (2, 192, 8)
    np.testing.assert_array_equal(sharded.to_dense(), layers.to_dense())
