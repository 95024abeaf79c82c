"""Models in several files with an index, written and read."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from helpers.files import assert_holds, header_of, model_tensors
from safetensors import safe_open

from upg_jax import FormatError, MdCSR, UPGDecompressor, save


def test_shards_hold_the_model_and_stay_below_the_limit(tmp_path):
    tensors = model_tensors(manifold="prime")
    save(
        tmp_path / "model.safetensors",
        tensors,
        metadata={"a": "b"},
        model={"n": 1},
        max_shard_bytes=2_000_000,
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        f = UPGDecompressor.from_safetensors(path)
        f.verify()
        assert sorted(f.names()) == sorted(tensors)
        assert (f.metadata, f.model) == ({"a": "b"}, {"n": 1})
    for name, tensor in tensors.items():
        if isinstance(tensor, MdCSR):
            assert_holds(f.get_layer(name), tensor)
        else:
            np.testing.assert_array_equal(f.get_array(name), tensor)
    for file in files:
        data = sum(t.nbytes for n, t in header_of(file).tensors.items() if not n.startswith("__padding__"))
        assert data <= 2_000_000
        with safe_open(file, framework="np") as stock:
            assert set(stock.keys()) == set(header_of(file).tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in header_of(file).tensors.values()
    )


def test_a_model_below_the_limit_is_one_file(tmp_path):
    save(tmp_path / "model.safetensors", model_tensors(1), max_shard_bytes=10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    tensors = {"a": np.ones(10, np.float32), "b": np.ones(1000, np.float32), "c": np.ones(10, np.float32)}
    save(tmp_path / "model.safetensors", tensors, max_shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    UPGDecompressor.from_safetensors(tmp_path).verify()


@pytest.mark.parametrize("first", [None, 100])
@pytest.mark.parametrize("second", [None, 100])
def test_a_sharded_model_is_neither_replaced_nor_left_beside_a_single_one(tmp_path, first, second):
    path = tmp_path / "model.safetensors"
    tensors = {f"w.{i}": np.full(20, i, np.float32) for i in range(5)}
    save(path, tensors, max_shard_bytes=first)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if first is None and second is None:
        save(path, tensors)
    else:
        with pytest.raises(FormatError, match="cannot stand side by side"):
            save(path, tensors, max_shard_bytes=second)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_sharded_save_leaves_nothing(tmp_path, monkeypatch):
    tensors = {f"w.{i}": np.full(20, i, np.float32) for i in range(5)}
    replace = os.replace
    for failing in range(6):
        calls = []

        def fails(source, target, failing=failing, calls=calls):
            calls.append(target)
            if len(calls) == failing + 1:
                raise OSError("rename failed")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="rename failed"):
            save(tmp_path / "model.safetensors", tensors, max_shard_bytes=100)
        assert list(tmp_path.iterdir()) == [], f"rename {failing}"


def test_stray_shards_are_not_overwritten(tmp_path):
    tensors = {f"w.{i}": np.full(20, i, np.float32) for i in range(2)}
    (tmp_path / "model-00001-of-00002.safetensors").write_text("precious")
    with pytest.raises(FormatError, match="belongs to no index"):
        save(tmp_path / "model.safetensors", tensors, max_shard_bytes=100)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]
