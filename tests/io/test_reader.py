"""What `UPGDecompressor` gives back, and that it does not copy it."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.crafted import Crafted, join
from helpers.files import assert_holds, layer
from oracle import mdcsr as oracle
from safetensors.numpy import save_file

import upg_jax
from upg_jax import FormatError, MdCSR, UPGDecompressor, save
from upg_jax.io import TensorInfo

PLANES = ("values", "delta_indices", "prime_indices")


@pytest.fixture(params=["unit", "prime"])
def model(tmp_path, request):
    """A file with four large consecutive layers, four small ones, and dense tensors."""
    tensors = {}
    for i in range(4):
        tensors[f"layers.{i}.large"] = layer((256, 512), 0.8, request.param, seed=i)
        tensors[f"layers.{i}.small"] = layer((33, 67), 0.3, request.param, seed=i)
    tensors["norm"] = np.linspace(0, 1, 33, dtype=np.float32)
    tensors["embed"] = np.random.default_rng(0).standard_normal((100, 64)).astype(ml_dtypes.bfloat16)
    path = tmp_path / "model.safetensors"
    save(path, tensors, metadata={"license": "mit"}, model={"layers": 4}, provenance={"from": ["nothing"]})
    return path, tensors


def address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


def planes_of(a_layer: MdCSR) -> list:
    return [getattr(a_layer, plane) for plane in PLANES if getattr(a_layer, plane) is not None]


def mapped_ranges(path) -> list[tuple[int, int]]:
    """Addresses at which the kernel says the file is mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, stop = line.split()[0].split("-")
            ranges.append((int(start, 16), int(stop, 16)))
    return ranges


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


# -- zero copy


@pytest.mark.parametrize("size", ["large", "small"])
def test_a_layers_planes_are_the_map_itself(model, size):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    for i in range(4):
        on_device, on_host = (
            f.get_layer(f"layers.{i}.{size}"),
            f.get_layer(f"layers.{i}.{size}", device=False),
        )
        for ours, mapped in zip(planes_of(on_device), planes_of(on_host), strict=True):
            assert isinstance(ours, jax.Array)
            assert address(ours) == address(mapped)
            assert address(ours) % 64 == 0


@needs_proc
def test_host_planes_lie_in_the_kernels_map_of_the_file(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    ranges = mapped_ranges(path)
    for name in f.names():
        arrays = planes_of(f.get_layer(name)) if "layers" in name else [f.get_array(name)]
        for array in arrays:
            assert any(start <= address(array) < stop for start, stop in ranges), name


@pytest.mark.parametrize("size", ["large", "small"])
def test_a_stacks_planes_are_the_map_itself(model, size):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    names = [f"layers.{i}.{size}" for i in range(4)]
    for chosen in (names, names[1:3], names[2:]):
        stack = f.get_stack(chosen)
        assert stack.stack_size == len(chosen)
        singles = [f.get_layer(name, device=False) for name in chosen]
        for ours, first in zip(planes_of(stack), planes_of(singles[0]), strict=True):
            assert address(ours) == address(first)
        for i, name in enumerate(chosen):
            assert_holds(stack, tensors[name], i)


def test_layers_that_are_no_run_are_stacked_by_copying(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    for order in ([3, 2, 1, 0], [0, 2], [1, 1]):
        stack = f.get_stack([f"layers.{i}.small" for i in order])
        for place, i in enumerate(order):
            assert_holds(stack, tensors[f"layers.{i}.small"], place)


def test_dense_tensors_are_the_map_itself(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    for name in ("norm", "embed"):
        on_device, on_host = f.get_array(name), f.get_array(name, device=False)
        assert address(on_device) == address(on_host)
        assert on_device.dtype == tensors[name].dtype
        np.testing.assert_array_equal(on_device, tensors[name])


def test_a_stack_read_in_place_computes_inside_jit(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    stack = f.get_stack([f"layers.{i}.small" for i in range(4)])
    x = jnp.ones((2, 67), jnp.float32)
    run = jax.jit(lambda stack, i: upg_jax.sparse_dense(x, stack, index=i))
    for i in range(4):
        expected = upg_jax.sparse_dense(x, tensors[f"layers.{i}.small"])
        np.testing.assert_array_equal(run(stack, jnp.int32(i)), expected)


def test_host_views_are_read_only(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    for array in (*planes_of(f.get_layer("layers.0.large", device=False)), f.get_array("norm", device=False)):
        assert not array.flags.writeable


def test_a_file_of_another_writer_is_read_at_any_alignment(tmp_path):
    crafted = Crafted("prime")
    header = json.dumps(crafted.header())
    for shift in range(8):
        path = tmp_path / f"{shift}.safetensors"
        path.write_bytes(join(header + " " * shift, crafted.data()))
        f = UPGDecompressor.from_safetensors(path)
        f.verify()
        layer = f.get_layer("w")
        for plane in (*PLANES, "scales", "row_pointers"):
            np.testing.assert_array_equal(getattr(layer, plane), crafted.tensors[f"w.{plane}"])
        np.testing.assert_array_equal(f.decompress_layer("w"), oracle.decode_layer(layer))
        np.testing.assert_array_equal(f.get_array("norm"), crafted.tensors["norm"])


def test_a_file_of_the_stock_writer_is_read(tmp_path):
    crafted = Crafted()
    path = tmp_path / "stock.safetensors"
    save_file(crafted.tensors, path, metadata=crafted.header()["__metadata__"])
    f = UPGDecompressor.from_safetensors(path)
    f.verify()
    np.testing.assert_array_equal(f.decompress_layer("w"), crafted.dense)


# -- contents


def test_names_come_with_matrices_first_in_layer_order(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    names = f.names()
    assert names[:8] == [*(f"layers.{i}.large" for i in range(4)), *(f"layers.{i}.small" for i in range(4))]
    assert sorted(names[8:]) == ["embed", "norm"]
    assert "norm" in f
    assert "layers.0.large" in f
    assert "layers.0.large.values" not in f
    assert "__padding__.0" not in f


def test_decompressing_gives_the_original_dtype_or_the_one_asked_for(tmp_path):
    w = np.random.default_rng(0).standard_normal((33, 67)).astype(ml_dtypes.bfloat16)
    path = tmp_path / "model.safetensors"
    save(path, {"w": MdCSR.from_dense(w, manifold="prime"), "norm": w[0]})
    f = UPGDecompressor.from_safetensors(path)
    for name, original in (("w", w), ("norm", w[0])):
        assert f.decompress_layer(name).dtype == jnp.bfloat16
        np.testing.assert_array_equal(f.decompress_layer(name), original)
        assert f.decompress_layer(name, jnp.float32).dtype == jnp.float32


def test_metadata_model_and_provenance_come_back(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    assert (f.metadata, f.model) == ({"license": "mit"}, {"layers": 4})
    assert f.provenance == {"from": ["nothing"]}
    copy = path.with_name("copy.safetensors")
    save(copy, tensors, metadata=f.metadata, model=f.model, provenance=f.provenance)
    assert copy.read_bytes() == path.read_bytes()


def test_a_file_may_have_neither_model_nor_provenance(tmp_path):
    save(tmp_path / "model.safetensors", {})
    f = UPGDecompressor.from_safetensors(tmp_path)
    assert (f.metadata, f.model, f.provenance) == ({}, None, None)


def test_info_describes_tensors_from_the_header(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    for name, tensor in tensors.items():
        info = f.info(name)
        assert (info.name, info.shape) == (name, tensor.shape)
        if isinstance(tensor, MdCSR):
            back = f.get_layer(name)
            assert info == TensorInfo(
                name=name,
                kind="mdcsr",
                shape=tensor.shape,
                dtype="float32",
                stored_bytes=back.nbytes,
                manifold=tensor.manifold,
                capacity=back.capacity,
                true_nnz=tensor.true_nnz,
                row_alignment=1,
                index="delta8",
                value_bits=8,
            )
            assert info.bits_per_weight == back.bits_per_weight
        else:
            assert info == TensorInfo(name, "dense", tensor.shape, tensor.dtype.name, tensor.nbytes)
            assert info.num_weights == tensor.size


def test_verify_reports_each_tensor(model):
    path, tensors = model
    seen = []
    UPGDecompressor.from_safetensors(path).verify(progress=seen.append)
    assert sorted(seen) == sorted(tensors)


def test_a_64_bit_tensor_is_never_narrowed(tmp_path):
    save(tmp_path / "model.safetensors", {"a": np.array([2**40, 1])})
    f = UPGDecompressor.from_safetensors(tmp_path)
    for read in (f.get_array, f.decompress_layer):
        with pytest.raises(FormatError, match="JAX would narrow int64; set jax_enable_x64"):
            read("a")
    np.testing.assert_array_equal(f.get_array("a", device=False), [2**40, 1])


def test_a_tensor_of_a_few_bits_is_named(tmp_path):
    header = {
        "__metadata__": {"format": "upg-mdcsr", "version": "2.0", "mdcsr": "{}"},
        "a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
    }
    (tmp_path / "model.safetensors").write_bytes(join(json.dumps(header), b"\0"))
    f = UPGDecompressor.from_safetensors(tmp_path)
    assert f.info("a").dtype == "F4"
    f.verify()
    with pytest.raises(FormatError, match="tensor 'a': NumPy has no dtype like F4"):
        f.get_array("a")


# -- mistakes


def test_an_unknown_name_is_refused_with_the_nearest(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    for read in (f.get_layer, f.get_array, f.decompress_layer, f.info, lambda name: f.get_stack([name])):
        with pytest.raises(
            FormatError, match=r"no tensor 'layers\.0\.lrge'; did you mean 'layers\.0\.large'"
        ):
            read("layers.0.lrge")


def test_the_wrong_method_names_the_right_one(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    with pytest.raises(FormatError, match="is dense; use get_array"):
        f.get_layer("norm")
    with pytest.raises(FormatError, match="is compressed; use get_layer"):
        f.get_array("layers.0.large")


def test_a_stack_needs_layers_of_equal_metadata(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    with pytest.raises(ValueError, match="at least one layer"):
        f.get_stack([])
    with pytest.raises(ValueError, match="equal metadata"):
        f.get_stack(["layers.0.large", "layers.0.small"])


# -- closing


def test_layers_outlive_the_reader(model):
    path, tensors = model
    with UPGDecompressor.from_safetensors(path) as f:
        held = f.get_layer("layers.2.large")
        norm = f.get_array("norm", device=False)
    del f
    gc.collect()
    path.unlink()
    assert_holds(held, tensors["layers.2.large"])
    np.testing.assert_array_equal(norm, tensors["norm"])


def test_a_closed_reader_reads_no_more(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    f.close()
    f.close()
    assert repr(f) == "UPGDecompressor(closed)"
    for read in (f.get_layer, f.get_array, f.decompress_layer, f.info):
        with pytest.raises(ValueError, match="closed"):
            read("norm")
    for check in (f.names, f.verify):
        with pytest.raises(ValueError, match="closed"):
            check()


@needs_proc
def test_the_map_goes_with_its_last_array(model):
    path, _ = model
    f = UPGDecompressor.from_safetensors(path)
    held = f.get_layer("layers.0.large")
    f.close()
    del f
    gc.collect()
    assert mapped_ranges(path)
    del held
    gc.collect()
    assert not mapped_ranges(path)


@needs_proc
def test_no_file_descriptor_is_kept(model):
    path, _ = model
    before = set(Path("/proc/self/fd").iterdir())
    f = UPGDecompressor.from_safetensors(path)
    f.get_layer("layers.0.large")
    # Python's mmap duplicates the descriptor; one a file is what a map costs.
    assert len(set(Path("/proc/self/fd").iterdir()) - before) <= 1
    f.close()
    del f
    gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_threads_may_share_a_reader(model):
    path, tensors = model
    f = UPGDecompressor.from_safetensors(path)
    failures = []

    def read():
        for name, tensor in tensors.items():
            try:
                if isinstance(tensor, MdCSR):
                    assert_holds(f.get_layer(name), tensor)
                else:
                    np.testing.assert_array_equal(f.get_array(name), tensor)
            except AssertionError as error:
                failures.append((name, error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_repr_says_what_is_open(model):
    path, _ = model
    assert repr(UPGDecompressor.from_safetensors(path)) == f"UPGDecompressor({path}: 8 compressed, 2 dense)"
