"""Files that store packed layers: they come back in their form, without copies, and are checked as strictly."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.crafted import Crafted
from helpers.files import assert_holds, layer
from oracle.mdcsr import decode_layer

from upg_jax import FormatError, UPGDecompressor, pack, save, unpack

PACKED = ("mask", "dense")


def address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", PACKED)
@pytest.mark.parametrize("shape", [(256, 512), (33, 67)])
def test_packed_layers_come_back_as_they_were_saved(tmp_path, index, manifold, shape):
    tensors = {f"layers.{i}.w": pack(layer(shape, 0.8, manifold, seed=i), index) for i in range(4)}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    for name, original in tensors.items():
        assert f.info(name).index == index
        assert_holds(f.get_layer(name), original)
        unpacked = unpack(f.get_layer(name, device=False))
        np.testing.assert_array_equal(decode_layer(unpacked), decode_layer(original))
    stacked = f.get_stack(list(tensors))
    stacked.validate("full")
    for i, original in enumerate(tensors.values()):
        assert_holds(stacked, original, i)


@pytest.mark.parametrize("index", PACKED)
def test_a_packed_stacks_planes_are_the_map_itself(tmp_path, index):
    # Masks lie side by side where their length is a multiple of 64 bytes.
    tensors = {f"layers.{i}.w": pack(layer((256, 512), 0.8, seed=i), index) for i in range(3)}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    stacked = f.get_stack(list(tensors))
    for plane in ("values",) if index == "dense" else ("values", "delta_indices"):
        first = getattr(f.get_layer("layers.0.w", device=False), plane)
        assert address(getattr(stacked, plane)) == address(first)


def test_masks_of_odd_lengths_leave_the_other_planes_uncopied(tmp_path):
    tensors = {f"layers.{i}.w": pack(layer((67, 33), 0.8, seed=i), "mask") for i in range(3)}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    stacked = f.get_stack(list(tensors))
    first = f.get_layer("layers.0.w", device=False)
    assert address(stacked.values) == address(first.values)
    for i, original in enumerate(tensors.values()):
        assert_holds(stacked, original, i)


def test_a_stack_of_packed_layers_is_saved_layer_by_layer(tmp_path):
    original = layer((64, 64), 0.5)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), pack(original, "mask"))
    path = tmp_path / "model.safetensors"
    save(path, {"layers.{}.w": stacked, "other.0.w": original})
    f = UPGDecompressor.from_safetensors(path)
    assert_holds(f.get_layer("layers.1.w"), pack(original, "mask"))
    with pytest.raises(ValueError, match="index is 'mask' in layer 0 and 'delta8' in layer 1"):
        f.get_stack(["layers.0.w", "other.0.w"])


def crafted_mask() -> Crafted:
    crafted = Crafted()
    crafted.facts["index"] = "mask"
    bits = np.zeros((3, 320), bool)
    bits[0, [0, 5, 12, 15]] = True
    bits[2, [255, 299]] = True
    crafted.tensors["w.delta_indices"] = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
    return crafted


def crafted_dense() -> Crafted:
    crafted = Crafted()
    crafted.facts["index"] = "dense"
    levels = np.zeros((3, 300), np.int8)
    levels[0, [0, 5, 12, 15]] = [1, -2, 3, -127]
    levels[2, 299] = 5
    crafted.tensors["w.values"] = levels.reshape(-1)
    crafted.tensors["w.delta_indices"] = np.zeros(0, np.uint8)
    crafted.tensors["w.row_pointers"] = np.array([0, 300, 600, 900], np.uint32)
    return crafted


@pytest.mark.parametrize("crafted", [crafted_mask(), crafted_dense()], ids=PACKED)
def test_a_file_made_by_hand_is_read(tmp_path, crafted):
    path = tmp_path / "w.safetensors"
    path.write_bytes(crafted.bytes())
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    np.testing.assert_array_equal(f.decompress_layer("w"), crafted.dense)


def edited(crafted: Crafted, plane: str, at: int, value: int) -> Crafted:
    crafted.tensors[f"w.{plane}"][at] = value
    return crafted


@pytest.mark.parametrize(
    ("crafted", "said", "when"),
    [
        (edited(crafted_mask(), "delta_indices", 50, 1), "row 1: a row's mask has at most one bit", "read"),
        (edited(crafted_mask(), "delta_indices", 39, 1), "row 0: columns must stay below", "read"),
        (edited(crafted_mask(), "values", 0, 0), "row 0: an entry of value 0", "verify"),
        (edited(crafted_dense(), "row_pointers", 1, 299), "row 0: every row must have 300", "read"),
        (edited(crafted_dense(), "row_pointers", 3, 901), "row_pointers end at 901", "read"),
    ],
)
def test_a_broken_rule_is_refused_by_file_and_row(tmp_path, crafted, said, when):
    path = tmp_path / "w.safetensors"
    path.write_bytes(crafted.bytes())
    f = UPGDecompressor.from_safetensors(path)
    if when == "verify":
        f.get_layer("w")
    with pytest.raises(FormatError, match=f"w.safetensors: tensor 'w': {said}"):
        f.verify() if when == "verify" else f.get_layer("w")


@pytest.mark.parametrize("crafted", [crafted_mask(), crafted_dense()], ids=PACKED)
def test_columns_of_another_length_are_refused_on_opening(tmp_path, crafted):
    columns = crafted.tensors["w.delta_indices"]
    crafted.tensors["w.delta_indices"] = np.append(columns, np.uint8(0))
    path = tmp_path / "w.safetensors"
    path.write_bytes(crafted.bytes())
    with pytest.raises(FormatError, match=rf"delta_indices must be U8 \({columns.size},\)"):
        UPGDecompressor.from_safetensors(path)
