"""What `save` refuses, and that it writes whole files or none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers.files import assert_holds, layer

import upg_jax
from upg_jax import FormatError, UPGDecompressor, save

# -- refusals


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": "layer", "a.values": "array"},
        {"a.row_pointers": "array", "a": "layer"},
        {"a.values": "layer", "a": "layer"},
        {"layers.{}.w": "stack", "layers.1.w": "layer"},
        {"layers.{}.w": "stack", "layers.0.w.scales": "array"},
    ],
)
def test_colliding_names_are_refused(tmp_path, tensors):
    kinds = {"layer": layer(), "array": np.ones(3, np.float32), "stack": upg_jax.stack([layer(), layer()])}
    with pytest.raises(FormatError, match="both need the name"):
        save(tmp_path / "model.safetensors", {name: kinds[kind] for name, kind in tensors.items()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["__metadata__", "__padding__.0", "__padding__.x"])
def test_reserved_names_are_refused(tmp_path, name):
    for tensor in (layer(), np.ones(3, np.float32)):
        with pytest.raises(FormatError, match="reserved by the file format"):
            save(tmp_path / "model.safetensors", {name: tensor})


@pytest.mark.parametrize("name", [3, None, b"w"])
def test_names_must_be_strings(tmp_path, name):
    with pytest.raises(FormatError, match="names must be strings"):
        save(tmp_path / "model.safetensors", {name: np.ones(3, np.float32)})


def test_names_must_be_valid_unicode(tmp_path):
    with pytest.raises(FormatError, match="name: text must not contain lone surrogates"):
        save(tmp_path / "model.safetensors", {"\ud800": np.ones(3, np.float32)})


@pytest.mark.parametrize(
    "leaf", [[1.0, 2.0], 3.0, None, np.array(["a"]), np.array([None]), np.zeros(3, ">f4"), np.zeros(2, "c16")]
)
def test_leaves_of_other_kinds_are_refused(tmp_path, leaf):
    with pytest.raises(FormatError, match="tensor 'w': must be an MdCSR or an array of"):
        save(tmp_path / "model.safetensors", {"w": leaf})


@pytest.mark.parametrize("key", ["format", "version", "mdcsr", "model", "provenance"])
def test_reserved_metadata_is_refused(tmp_path, key):
    with pytest.raises(FormatError, match=f"metadata key '{key}'"):
        save(tmp_path / "model.safetensors", {}, metadata={key: "x"})


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(FormatError, match="strings to strings"):
        save(tmp_path / "model.safetensors", {}, metadata={"a": 1})
    with pytest.raises(FormatError, match="metadata: text must not contain lone surrogates"):
        save(tmp_path / "model.safetensors", {}, metadata={"a": "\ud800"})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "model.safetensors", {}, model={"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_breaks_the_format_is_not_written(tmp_path):
    import dataclasses

    bad = dataclasses.replace(layer(), row_pointers=layer().row_pointers[::-1])
    with pytest.raises(FormatError, match="tensor 'w': row_pointers must start at 0"):
        save(tmp_path / "model.safetensors", {"w": bad})
    bad = dataclasses.replace(layer(), scales=layer().scales * np.float32(np.nan))
    with pytest.raises(FormatError, match="tensor 'w': row 0: scales"):
        save(tmp_path / "model.safetensors", {"w": bad})
    assert list(tmp_path.iterdir()) == []


# -- atomicity


class FailsLater(Mapping):
    """Gives every tensor when the file is planned, and fails when the last one is written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.asked = 0

    def __getitem__(self, name):
        self.asked += 1
        if self.asked > 2:
            raise self.error
        return np.ones(100_000, np.float32)

    def __iter__(self):
        return iter(["a", "b"])

    def __len__(self):
        return 2


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "model.safetensors"
    save(path, {"old": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(type(error)):
        save(path, FailsLater(error))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"w": layer()})
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    calls = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append((kind, path.exists()))
        sync(descriptor)

    def record_replace(*args):
        calls.append(("replace", path.exists()))
        replace(*args)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    save(path, {"w": layer()})
    assert calls == [("file", False), ("replace", False), ("directory", True)]


def test_a_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, {"old": np.ones(3, np.float32)})
    before = path.read_bytes()
    script = textwrap.dedent(
        f"""
        import os
        from collections.abc import Mapping
        import numpy as np
        from upg_jax import save

        class Kills(Mapping):
            asked = 0
            def __getitem__(self, name):
                self.asked += 1
                if self.asked > 1:
                    os.kill(os.getpid(), 9)
                return np.ones(1000, np.float32)
            def __iter__(self): return iter(["a"])
            def __len__(self): return 1

        save({str(path)!r}, Kills())
        """
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=Path(upg_jax.__file__).parents[1]
    )
    assert killed.returncode == -9
    assert path.read_bytes() == before
    assert UPGDecompressor.from_safetensors(tmp_path).names() == ["old"], (
        "the leftover is not taken for a model"
    )


def test_replacing_a_mapped_file_keeps_the_old_map(tmp_path):
    path = tmp_path / "model.safetensors"
    first, second = layer(seed=1), layer(seed=2)
    save(path, {"w": first, "v": second})
    f = UPGDecompressor.from_safetensors(path)
    held = f.get_layer("w")
    save(path, {"w": second})
    assert_holds(held, first)
    assert_holds(f.get_layer("v"), second)
    assert_holds(UPGDecompressor.from_safetensors(path).get_layer("w"), second)


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(tmp_path):
    path = tmp_path / "model.safetensors"
    original = layer(seed=1)
    save(path, {"w": original, "norm": np.ones(3, np.float32)})
    f = UPGDecompressor.from_safetensors(path)
    save(path, {"w": f.get_layer("w", device=False), "norm": f.get_array("norm", device=False)})
    assert_holds(UPGDecompressor.from_safetensors(path).get_layer("w"), original)


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    save(path, {})
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_directory_is_not_replaced(tmp_path):
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        save(path, {"w": layer()})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_that_names_no_file_is_an_error(path):
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        save(path, {"w": layer()})


@pytest.mark.parametrize("value", [float("inf"), object()])
@pytest.mark.parametrize("key", ["model", "provenance"])
def test_a_description_that_is_not_json_is_refused(tmp_path, key, value):
    with pytest.raises(FormatError, match=f"save: {key} must be JSON values"):
        save(tmp_path / "model.safetensors", {}, **{key: {"a": value}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def write_to_a_full_disk(*_):
        with open("/dev/full", "wb") as file:
            file.write(b"x")

    monkeypatch.setattr(upg_jax.io._writer, "write_file", write_to_a_full_disk)
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        save(path, {"w": layer()})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_an_error(tmp_path):
    path = tmp_path / "none" / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"none/model\.safetensors'"):
        save(path, {"w": layer()})


def test_a_tensor_that_changes_while_it_is_saved_is_refused(tmp_path):
    class Changes(FailsLater):
        def __getitem__(self, name):
            self.asked += 1
            return np.ones(3 if self.asked < 3 else 4, np.float32)

    with pytest.raises(FormatError, match="must not change while it is saved"):
        save(tmp_path / "model.safetensors", Changes(OSError()))
    assert list(tmp_path.iterdir()) == []
