"""Layout, atomicity and refusals of `save`."""

from __future__ import annotations

import functools
import itertools
import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.files import assert_holds
from helpers.layers import gaps_matrix, matrix
from oracle import mdcsr as oracle
from safetensors import safe_open

import upg_jax
from upg_jax import FormatError, MdCSR, UPGDecompressor, save
from upg_jax.io._header import read_header


@functools.cache
def layer(shape=(67, 33), density=0.5, manifold="unit", seed=0, **options) -> MdCSR:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return MdCSR.from_dense(w, density=density, manifold=manifold, **options)


def header_of(path):
    with open(path, "rb") as file:
        return read_header(file, path)


def model_tensors(layers=4, manifold="unit", shape=(300, 257)):
    """Consecutive layers of a few sizes: small planes, middling ones and ones of many times 16 KiB."""
    tensors = {}
    for i in reversed(range(layers)):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.up.weight"] = layer(shape, 0.5, manifold, seed=i)
        tensors[f"{prefix}.large.weight"] = layer((512, 1024), 0.8, manifold, seed=i)
        tensors[f"{prefix}.tiny.weight"] = layer((7, 11), 0.5, manifold, seed=i)
        tensors[f"{prefix}.norm.weight"] = np.full(257, i, np.float32)
    tensors["embed.weight"] = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    return tensors


# -- layout


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_every_tensor_is_aligned(tmp_path, manifold):
    path = tmp_path / "model.safetensors"
    save(path, model_tensors(manifold=manifold))
    header = header_of(path)
    in_order = sorted(header.tensors.items(), key=lambda item: item[1].start)
    assert header.data_start % 16384 == 0
    for (before, left), (name, tensor) in zip([("", None), *in_order], in_order, strict=False):
        if name.startswith("__padding__"):
            continue
        assert tensor.start % 64 == 0, name
        plane = name.rsplit(".", 1)[-1]
        in_a_stack = before.endswith(plane) and left is not None and left.nbytes == tensor.nbytes
        if tensor.nbytes >= 16384 and not in_a_stack:
            assert tensor.start % 16384 == 0, name
        if "large" in name and plane in ("values", "delta_indices", "prime_indices"):
            assert tensor.start % 16384 == 0, name


def test_a_single_large_plane_starts_on_a_page(tmp_path):
    for shape in ((128, 128), (129, 300), (1000, 1000)):
        path = tmp_path / "model.safetensors"
        save(path, {"norm": np.ones(3), "w": layer(shape, 1.0, "prime")})
        header = header_of(path)
        for plane in ("values", "delta_indices", "prime_indices"):
            tensor = header.tensors[f"w.{plane}"]
            assert tensor.nbytes < 16384 or tensor.start % 16384 == 0


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("shape", [(7, 11), (100, 100), (150, 200), (300, 257), (512, 1024)])
def test_consecutive_layers_lie_side_by_side_at_equal_lengths(tmp_path, manifold, shape):
    # 11 layers, so that sorting names as text would put layer 10 behind layer 1.
    tensors = {f"layers.{i}.w": layer(shape, 0.8, manifold, seed=i) for i in range(11)}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    stored = header_of(path).tensors
    planes = ["values", "delta_indices"] + ["prime_indices"] * (manifold == "prime")
    for plane in planes:
        ours = [stored[f"layers.{i}.w.{plane}"] for i in range(11)]
        assert len({tensor.shape for tensor in ours}) == 1
        for left, right in itertools.pairwise(ours):
            assert right.start == left.stop


def test_padding_costs_at_most_five_percent(tmp_path):
    for density in (0.1, 0.5, 1.0):
        # The shapes of SmolLM2-135M.
        shapes = {"q": (576, 576), "k": (192, 576), "up": (1536, 576)}
        path = tmp_path / "model.safetensors"
        tensors = {f"layers.{i}.{k}": layer(s, density, seed=i) for i in range(3) for k, s in shapes.items()}
        save(path, tensors)
        entries = sum(tensor.nnz for tensor in tensors.values())
        f = UPGDecompressor.from_safetensors(path)
        stored = sum(f.info(name).capacity for name in f.names())
        assert entries <= stored <= 1.05 * entries


def test_layers_of_uneven_sizes_keep_their_own_lengths(tmp_path):
    tensors = {f"layers.{i}.w": layer((200, 300), density, seed=i) for i, density in enumerate((0.2, 0.9))}
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    lengths = [f.info(name).capacity for name in sorted(tensors)]
    assert lengths[0] < 0.3 * lengths[1]
    stack = f.get_stack(sorted(tensors))
    for i, name in enumerate(sorted(tensors)):
        assert_holds(stack, tensors[name], i)


def test_layers_of_different_metadata_do_not_share_a_stack(tmp_path):
    tensors = {
        "layers.0.w": layer(),
        "layers.1.w": layer(manifold="prime"),
        "layers.2.w": layer(row_alignment=8),
    }
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    f = UPGDecompressor.from_safetensors(path)
    for name, original in tensors.items():
        assert_holds(f.get_layer(name), original)


def test_experts_lie_side_by_side_across_layers(tmp_path):
    names = [f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(3)]
    path = tmp_path / "model.safetensors"
    save(path, {name: layer((64, 64), seed=n) for n, name in reversed(list(enumerate(names)))})
    stored = header_of(path).tensors
    ours = [stored[f"{name}.values"] for name in names]
    assert all(right.start == left.stop for left, right in itertools.pairwise(ours))


def test_row_alignment_survives(tmp_path):
    path = tmp_path / "model.safetensors"
    for alignment in (8, 64, 256):
        original = layer(row_alignment=alignment)
        save(path, {"w": original})
        f = UPGDecompressor.from_safetensors(path)
        f.verify()
        assert_holds(f.get_layer("w"), original)


def test_a_long_tail_is_not_stored(tmp_path):
    path = tmp_path / "model.safetensors"
    original = layer(capacity=1 << 20)
    save(path, {"w": original})
    assert path.stat().st_size < 20_000
    assert_holds(UPGDecompressor.from_safetensors(path).get_layer("w"), original)


def test_a_stack_is_saved_as_layers_and_comes_back_as_a_stack(tmp_path):
    layers = [layer(seed=i) for i in range(3)]
    path = tmp_path / "model.safetensors"
    save(path, {"layers.{}.w": upg_jax.stack(layers)})
    f = UPGDecompressor.from_safetensors(path)
    assert f.names() == [f"layers.{i}.w" for i in range(3)]
    back = f.get_stack(f.names())
    for i, original in enumerate(layers):
        assert_holds(back, original, i)


@pytest.mark.parametrize("name", ["layers.w", "layers.{}.{}.w"])
def test_a_stack_needs_a_place_for_the_number(tmp_path, name):
    with pytest.raises(FormatError, match=r"stack of 2; give a name with '\{\}'"):
        save(tmp_path / "model.safetensors", {name: upg_jax.stack([layer(), layer(seed=1)])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_awkward_matrices_survive(tmp_path, manifold):
    rng = np.random.default_rng(3)
    structures = ("random", "full", "empty_rows", "full_row", "last_column", "zero")
    ws = {f"{s}-{n}": matrix(s, (n, 67), rng) for s in structures for n in (1, 3, 33)}
    ws |= {
        "gaps": gaps_matrix(),
        "no-rows": np.zeros((0, 5), np.float32),
        "no-columns": np.zeros((5, 0), np.float32),
    }
    layers = {name: MdCSR.from_dense(w, manifold=manifold) for name, w in ws.items()}
    path = tmp_path / "model.safetensors"
    save(path, layers)
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    for name, original in layers.items():
        assert_holds(f.get_layer(name, device=False), original)


DENSE_DTYPES = [
    *(np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DENSE_DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_dense_tensors_keep_dtype_and_bits(tmp_path, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 if dtype is np.bool_ else 256, 24 * np.dtype(dtype).itemsize, np.uint8)
    arrays = {
        "matrix": bits.view(dtype).reshape(4, 6),
        "transposed": bits.view(dtype).reshape(4, 6).T,
        "strided": bits.view(dtype)[::2],
        "scalar": bits.view(dtype)[0].reshape(()),
        "empty": bits.view(dtype)[:0].reshape(0, 3),
    }
    path = tmp_path / "model.safetensors"
    save(path, arrays)
    f = UPGDecompressor.from_safetensors(path)
    for name, array in arrays.items():
        back = f.get_array(name, device=False)
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert back.tobytes() == array.tobytes()


def test_jax_arrays_are_saved(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {"a": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), "b": jnp.ones((), jnp.int32)}
    save(path, arrays)
    f = UPGDecompressor.from_safetensors(path)
    for name, array in arrays.items():
        back = f.get_array(name)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_stock_safetensors_reads_the_files(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = model_tensors(2, "prime")
    save(path, tensors, metadata={"author": "someone"}, model={"layers": 2})
    with safe_open(path, framework="np") as stock:
        metadata = stock.metadata()
        assert metadata["format"] == "upg-mdcsr"
        assert metadata["version"] == "2.0"
        assert metadata["author"] == "someone"
        for name, tensor in tensors.items():
            if not isinstance(tensor, MdCSR):
                np.testing.assert_array_equal(stock.get_tensor(name), tensor)
                continue
            facts = json.loads(metadata["mdcsr"])[name]
            planes = [stock.get_tensor(f"{name}.{plane}") for plane in ("values", "delta_indices", "scales")]
            planes += [stock.get_tensor(f"{name}.row_pointers"), stock.get_tensor(f"{name}.prime_indices")]
            assert facts["true_nnz"] == np.count_nonzero(planes[0])
            if tensor.shape[0] < 10:
                np.testing.assert_array_equal(oracle.decode(*planes, facts["shape"]), tensor.to_dense())


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", model_tensors(2), model={"a": 1}, provenance={"b": [2]})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_without_tensors_is_a_file(tmp_path):
    save(tmp_path / "model.safetensors", {})
    f = UPGDecompressor.from_safetensors(tmp_path)
    f.verify()
    assert f.names() == []


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


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "model.safetensors", {"w": layer()})


def test_a_tensor_that_changes_while_it_is_saved_is_refused(tmp_path):
    class Changes(FailsLater):
        def __getitem__(self, name):
            self.asked += 1
            return np.ones(3 if self.asked < 3 else 4, np.float32)

    with pytest.raises(FormatError, match="must not change while it is saved"):
        save(tmp_path / "model.safetensors", Changes(OSError()))
    assert list(tmp_path.iterdir()) == []


# -- shards


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
