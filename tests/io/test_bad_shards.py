"""Rules of sharded models: one broken index or shard each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.crafted import Crafted

from upg_jax import FormatError, UPGDecompressor


@pytest.fixture
def sharded(tmp_path):
    """A model of two shards, as a function of the index's weight_map and each shard's Crafted."""

    def write(edit_map=lambda weight_map: None, edit_second=lambda crafted: None, index=None):
        first, second = Crafted(), Crafted("prime")
        second.tensors = {name.replace("w.", "v."): t for name, t in second.tensors.items() if name != "norm"}
        second.matrices = {"v": second.facts}
        edit_second(second)
        weight_map = {}
        for name, crafted in (("a.safetensors", first), ("b.safetensors", second)):
            (tmp_path / name).write_bytes(crafted.bytes())
            weight_map |= dict.fromkeys(crafted.tensors, name)
        edit_map(weight_map)
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) if index is None else index)
        return path

    return write


def test_the_sharded_model_is_good_until_it_is_changed(sharded, tmp_path):
    for path in (sharded(), tmp_path):
        with UPGDecompressor.from_safetensors(path) as f:
            f.verify()
            assert f.names() == ["w", "v", "norm"]
            np.testing.assert_array_equal(f.decompress_layer("w"), Crafted().dense)


def test_a_tensor_only_in_the_index_is_refused(sharded):
    path = sharded(lambda weight_map: weight_map.update(ghost="b.safetensors"))
    with pytest.raises(FormatError, match=r"b\.safetensors.*'ghost' is only in the index"):
        UPGDecompressor.from_safetensors(path)


def test_a_tensor_only_in_a_shard_is_refused(sharded):
    path = sharded(lambda weight_map: weight_map.pop("v.values"))
    with pytest.raises(FormatError, match=r"b\.safetensors.*'v\.values' is only in the shard"):
        UPGDecompressor.from_safetensors(path)


def test_a_missing_shard_is_refused(sharded, tmp_path):
    path = sharded()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(
        FormatError, match=r"index\.json: weight_map lists 'b\.safetensors', which is missing"
    ):
        UPGDecompressor.from_safetensors(path)


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", "", "a\\b", "C:b", "a\0b", 7, None]
)
def test_an_index_cannot_name_files_elsewhere(sharded, name):
    path = sharded(lambda weight_map: weight_map.update({"v.values": name}))
    with pytest.raises(FormatError, match=r"must name files beside the index; 'v\.values'"):
        UPGDecompressor.from_safetensors(path)


@pytest.mark.parametrize(
    ("metadata", "differs"),
    [
        ({"license": "other"}, "other"),
        ({"model": '{"model_type": "llama"}'}, "model"),
        ({"provenance": '{"tool": "another"}'}, "provenance"),
    ],
)
def test_shards_of_different_models_are_refused(sharded, metadata, differs):
    path = sharded(edit_second=lambda crafted: crafted.metadata.update(metadata))
    with pytest.raises(
        FormatError, match=rf"b\.safetensors: all shards .* same metadata; its {differs} differs"
    ):
        UPGDecompressor.from_safetensors(path)


def test_a_tensor_in_two_shards_is_refused(sharded):
    def add(crafted):
        crafted.tensors["norm"] = np.zeros(3, np.float32)

    path = sharded(edit_second=add)
    with pytest.raises(FormatError, match="'norm' is only in the shard"):
        UPGDecompressor.from_safetensors(path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "JSON"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' more than once"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!doctype html>", "HTML"),
    ],
)
def test_a_bad_index_is_refused(sharded, index, said):
    path = sharded(index=index)
    with pytest.raises(FormatError, match=rf"index\.json.*{said}"):
        UPGDecompressor.from_safetensors(path)
