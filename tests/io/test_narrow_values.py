"""Files with values of 4 and 3 bits: they come back, without copies, and every rule that is broken is named."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from helpers.crafted import Crafted
from helpers.files import assert_holds
from oracle.mdcsr import decode_layer
from safetensors import safe_open

from upg_jax import FormatError, MdCSR, UPGDecompressor, pack, save
from upg_jax._values import pack_values

INDEXES = ("delta8", "mask", "dense")


def layer(shape, bits, seed=0, **options) -> MdCSR:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jax.tree.map(np.asarray, MdCSR.from_dense(w, density=0.5, value_bits=bits, **options))


def address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("shape", [(128, 256), (33, 67)])
def test_layers_come_back_as_they_were_saved(tmp_path, index, shape, bits):
    tensors = {f"layers.{i}.w": layer(shape, bits, i, index=index, group_size=32) for i in range(3)}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    for name, original in tensors.items():
        info = f.info(name)
        assert (info.index, info.value_bits, info.group_size) == (index, bits, 32)
        assert info.capacity >= original.nnz
        assert info.true_nnz == original.true_nnz
        assert_holds(f.get_layer(name), original)
        np.testing.assert_array_equal(np.asarray(f.decompress_layer(name)), decode_layer(original))
    stacked = f.get_stack(list(tensors)).validate("full")
    for i, original in enumerate(tensors.values()):
        assert_holds(stacked, original, i)
    if shape == (128, 256):
        first = f.get_layer("layers.0.w", device=False)
        assert address(stacked.values) == address(first.values)
        assert address(stacked.group_scales) == address(first.group_scales)


def test_planes_start_where_a_map_of_them_needs_no_copy(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"layers.{i}.w": layer((512, 576), bits, index="mask") for i, bits in enumerate((4, 3))}
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    for name, original in tensors.items():
        held = f.get_layer(name, device=False)
        for plane in ("values", "delta_indices", "group_scales", "scales", "row_pointers"):
            assert address(getattr(held, plane)) % 64 == 0
        assert address(f.get_layer(name).values) == address(held.values)
        assert held.capacity <= 1.05 * original.nnz + 512


def test_the_version_says_what_a_reader_must_know(tmp_path):
    path = tmp_path / "model.safetensors"
    for tensors, version in (({"w": layer((4, 40), 4)}, "2.1"), ({"w": layer((4, 40), 8)}, "2.0")):
        save(path, tensors)
        with safe_open(path, framework="np") as f:
            assert f.metadata()["version"] == version
            assert ("group_size" in json.loads(f.metadata()["mdcsr"])["w"]) == (version == "2.1")


def test_a_stack_is_saved_layer_by_layer(tmp_path):
    one = pack(layer((64, 64), 3), "mask")
    path = tmp_path / "model.safetensors"
    save(path, {"layers.{}.w": jax.tree.map(lambda leaf: np.stack([leaf, leaf]), one)})
    assert_holds(UPGDecompressor.from_safetensors(path).get_layer("layers.1.w"), one)


def crafted(bits: int = 4) -> Crafted:
    """The values of `Crafted` in `bits`, in groups of 64 columns; that of group `g` in row `r` is 5 r + g + 1."""
    file = Crafted()
    file.metadata["version"] = "2.1"
    file.facts |= {"value_bits": bits, "group_size": 64, "row_alignment": 8 if bits == 3 else 2}
    q = np.array(
        [1, -2, 3, -3, 0, 3] if bits == 4 else [1, -2, 3, -3, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0], np.int8
    )
    deltas = np.zeros(q.size, np.uint8)
    deltas[:4] = [0, 5, 7, 3]
    second = 4 if bits == 4 else 8
    deltas[second : second + 2] = [255, 44]
    file.tensors["w.values"] = pack_values(q, bits)
    file.tensors["w.delta_indices"] = deltas
    file.tensors["w.row_pointers"] = np.array([0, second, second, q.size], np.uint32)
    file.tensors["w.group_scales"] = np.arange(1, 16).astype(np.uint8)
    return file


@pytest.mark.parametrize("bits", [4, 3])
def test_a_file_made_by_hand_is_read(tmp_path, bits):
    w = np.zeros((3, 300), np.float32)
    w[0, [0, 5, 12, 15]] = np.array([1, -2, 3, -3]) * 0.5
    w[2, 299] = 3 * 15 * 2
    path = tmp_path / "w.safetensors"
    path.write_bytes(crafted(bits).bytes())
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    np.testing.assert_array_equal(np.asarray(f.decompress_layer("w")), w)


def facts(**changes):
    def edit(file):
        file.facts |= changes

    return edit


def without_group_size(file):
    del file.facts["group_size"]


def plane(name, make):
    def edit(file):
        file.tensors[f"w.{name}"] = make(file.tensors.get(f"w.{name}"))

    return edit


def set_at(at, value):
    def change(array):
        array[at] = value
        return array

    return change


def missing(file):
    del file.tensors["w.group_scales"]


def prime(file):
    file.facts["manifold"] = "prime"
    file.tensors["w.prime_indices"] = np.zeros(6, np.uint16)


def eight_bits_with_multipliers(file):
    file.facts["value_bits"] = 8
    file.tensors["w.values"] = np.array([1, -2, 3, -3, 0, 3], np.int8)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            facts(value_bits=2),
            "this build reads index .* with value_bits 8, 4, 3; got 'delta8' with 2; upgrade",
        ),
        (facts(value_bits=4.0), "got 'delta8' with 4.0"),
        (facts(group_size=48), "group_size must be one of 32, 64, 128 with value_bits 4; got 48"),
        (facts(group_size=True), "group_size must be one of"),
        (without_group_size, "group_size must be one of 32, 64, 128 with value_bits 4; got None"),
        (prime, "the prime manifold has value_bits 8; got 4"),
        (missing, "tensor 'w': the metadata lists it but group_scales is missing"),
        (eight_bits_with_multipliers, "tensor 'w': value_bits 8 has no group_scales; the file has them"),
        (plane("group_scales", lambda a: a[:-1]), r"group_scales must be U8 \(15,\); got U8 \(14,\)"),
        (plane("group_scales", lambda a: a.view(np.int8)), r"group_scales must be U8 \(15,\); got I8"),
        (plane("values", lambda a: a[:-1]), r"delta_indices must be U8 \(4,\); got U8 \(6,\)"),
        (facts(true_nnz=7), "true_nnz must be at most the planes' length 6; got 7"),
    ],
)
def test_what_a_header_shows_is_refused_on_opening(tmp_path, edit, said):
    file = crafted()
    edit(file)
    path = tmp_path / "w.safetensors"
    path.write_bytes(file.bytes())
    with pytest.raises(FormatError, match=f"w.safetensors.*{said}"):
        UPGDecompressor.from_safetensors(path)


def test_a_plane_that_ends_within_a_value_is_refused(tmp_path):
    file = crafted(3)
    file.tensors["w.values"] = np.append(file.tensors["w.values"], np.zeros(1, np.int8))
    path = tmp_path / "w.safetensors"
    path.write_bytes(file.bytes())
    with pytest.raises(FormatError, match=r"tensor 'w': .*must be"):
        UPGDecompressor.from_safetensors(path).get_layer("w")


@pytest.mark.parametrize(
    ("edit", "said", "when"),
    [
        (facts(row_alignment=1), "row_alignment must be at least 2 with value_bits 4", "read"),
        (
            plane("row_pointers", set_at(1, 3)),
            "row 1: row_pointers must be multiples of row_alignment 2",
            "read",
        ),
        (plane("row_pointers", set_at(3, 8)), "row_pointers end at 8, past the planes' length 6", "read"),
        (plane("delta_indices", set_at(5, 45)), "row 2: columns must stay below in_features 300", "read"),
        (
            plane("group_scales", set_at(7, 0)),
            "row 1: group_scales must be 1 to 255; that of group 2 is 0",
            "verify",
        ),
        (plane("values", set_at(0, 0xE0 - 256)), "row 0: an entry of value 0 must have delta 255", "verify"),
        (facts(true_nnz=4), "true_nnz must be 5; the metadata says 4", "verify"),
    ],
)
def test_what_is_wrong_with_a_layer_is_refused_by_row(tmp_path, edit, said, when):
    file = crafted()
    edit(file)
    path = tmp_path / "w.safetensors"
    path.write_bytes(file.bytes())
    f = UPGDecompressor.from_safetensors(path)
    if when == "verify":
        f.get_layer("w")
    with pytest.raises(FormatError, match=f"w.safetensors: tensor 'w': {said}"):
        f.verify() if when == "verify" else f.get_layer("w")
