"""Where `save` puts what, and that everything comes back."""

from __future__ import annotations

import itertools
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.files import assert_holds, header_of, layer, model_tensors
from helpers.layers import gaps_matrix, matrix
from oracle import mdcsr as oracle
from safetensors import safe_open

import upg_jax
from upg_jax import FormatError, MdCSR, UPGDecompressor, save


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
