"""Committed files of every version, read as they were meant; see tests/golden/README.md."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import mdcsr as oracle
from safetensors import safe_open

from upg_jax import FormatError, UPGDecompressor
from upg_jax.io import convert_v1

GOLDEN = Path(__file__).parents[1] / "golden"
SHA256 = {
    "narrow.safetensors": "45e9657ef75b007dadd804f783a83a6661122f13ab8ff6d67ceb267c1b0bb77e",
    "prime.safetensors": "76a725660da16cc33a735ed45379210486dd05f1fe6ebcabbead60232102733f",
    "sharded/model-00001-of-00002.safetensors": "72c227b0eff724b4b3d84a4d316d737164c89f4c2b2b210123f25ede3bf25809",
    "sharded/model-00002-of-00002.safetensors": "8213de4666978d57a8405ce9a21142f7a503379d7818af716517ec054a876771",
    "sharded/model.safetensors.index.json": "42cd21be3730c54d639adbbb491d14edfdc472c21c9c4db5845dcf76f46d19a3",
    "unit.safetensors": "25735308ca0ec60a7879b6acdc36e683d5c2c19fabb24ff642d947728737c31a",
    "v1_catalogue.upg": "dcfcc86045c46629e4e1561ed49786c5c437ecc811d8df090d6367265fd02d47",
    "v1_protocol2.upg": "e4a198c2f9a901f237a5ebf7632086081d86849c2972e1985927a247ef8d7c66",
    "v1_protocol4.upg": "b340ca8093613b3acf514f45ee01a66ea59b9322838b21f3f4f1b3ec2e2b2542",
}


def _maker():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = _maker()


def test_every_golden_file_is_as_it_was_written():
    files = [file for file in GOLDEN.rglob("*") if file.suffix in (".safetensors", ".upg", ".json")]
    found = {
        file.relative_to(GOLDEN).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert found == SHA256


@pytest.mark.parametrize(
    ("name", "manifold"), [("unit.safetensors", "unit"), ("prime.safetensors", "prime"), ("sharded", "prime")]
)
def test_version_2_is_read_as_it_was_meant(name, manifold):
    f = UPGDecompressor.from_safetensors(GOLDEN / name)
    f.verify()
    assert (f.metadata, f.model, f.provenance) == (
        {"license": "Apache-2.0"},
        {"layers": 1},
        {"by": "make.py"},
    )
    assert sorted(f.names()) == ["aligned", "embed", "layers.0.w", "layers.1.w", "norm"]
    w = MAKE.weights()
    np.testing.assert_array_equal(f.get_array("norm"), np.arange(7, dtype=np.float32))
    np.testing.assert_array_equal(f.get_array("embed"), w[:2, :9].astype(ml_dtypes.bfloat16))
    originals = {
        "layers.0.w": w,
        "layers.1.w": 2 * w,
        "aligned": w.astype(ml_dtypes.bfloat16).astype(np.float32),
    }
    for matrix, original in originals.items():
        layer = f.get_layer(matrix)
        assert (layer.manifold, layer.row_alignment) == (manifold, 8 if matrix == "aligned" else 1)
        decoded = oracle.decode_layer(layer)
        np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), decoded)
        # Half a level: 1/127 of the row's largest, or the widest gap between products with primes.
        half = 0.5 / 127 if manifold == "unit" else 2667 / (127 * 104729)
        bound = (half + 2**-23) * np.abs(original).max(axis=1, keepdims=True)
        assert (np.abs(decoded - original) <= bound).all()


def test_values_of_fewer_than_8_bits_are_read_as_they_were_meant():
    f = UPGDecompressor.from_safetensors(GOLDEN / "narrow.safetensors")
    f.verify()
    w = MAKE.weights()
    for index, bits, size in (("delta8", 4, 32), ("mask", 4, 64), ("mask", 3, 64), ("dense", 3, 128)):
        layer = f.get_layer(f"{index}.{bits}bits")
        assert (layer.index, layer.value_bits, layer.group_size) == (index, bits, size)
        decoded = oracle.decode_layer(layer)
        np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), decoded)
        # Half a level, or a largest weight that is clipped to half of what it was.
        assert (np.abs(decoded - w) <= 0.5001 * np.abs(w).max(axis=1, keepdims=True)).all()
        assert ((decoded != 0) <= (w != 0)).all()


@pytest.mark.parametrize("name", ["unit.safetensors", "prime.safetensors"])
def test_stock_safetensors_reads_version_2(name):
    ours = UPGDecompressor.from_safetensors(GOLDEN / name)
    with safe_open(GOLDEN / name, framework="np") as stock:
        for matrix in ("layers.0.w", "layers.1.w", "aligned"):
            layer = ours.get_layer(matrix, device=False)
            for plane in ("values", "delta_indices", "scales", "row_pointers"):
                np.testing.assert_array_equal(stock.get_tensor(f"{matrix}.{plane}"), getattr(layer, plane))


@pytest.mark.parametrize("name", ["v1_protocol2.upg", "v1_protocol4.upg"])
def test_version_1_is_converted_as_it_was_meant(tmp_path, name):
    convert_v1(GOLDEN / name, tmp_path / "model.safetensors", manifold="prime")
    f = UPGDecompressor.from_safetensors(tmp_path)
    content = MAKE.v1_content()["tensors"]
    pattern = content["scipy_float"]
    columns, rows = pattern.indices, np.repeat(np.arange(4), np.diff(pattern.indptr))
    values = np.array([1, -2, 3, -127, 4, 5, -6, 7])
    primes = np.array(oracle.primes())[[0, 1, 2, 9999, 500, 0, 77, 4]]
    expected = {name: np.zeros((4, 700), np.float32) for name in ("absolute", "deltas", "scipy_int8")}
    scales = np.array([0.5, 1.0, 2.0, 0.25], np.float32)
    expected["absolute"][rows, columns] = (values * primes).astype(np.float32) * scales[rows]
    expected["deltas"][0, [0, 5, 12, 15]] = np.array([1, -2, 3, -127]) * 0.125
    expected["scipy_int8"][rows, columns] = values
    for tensor, dense in expected.items():
        np.testing.assert_array_equal(oracle.decode_layer(f.get_layer(tensor, device=False)), dense)
    np.testing.assert_array_equal(f.get_array("norm"), np.arange(5, dtype=np.float16))
    floats = oracle.decode_layer(f.get_layer("scipy_float", device=False))
    np.testing.assert_allclose(floats, pattern.toarray(), rtol=0, atol=127 * 2667 / (127 * 104729))


def test_a_version_1_catalogue_says_what_it_is(tmp_path):
    with pytest.raises(FormatError, match="only a catalogue of 1 tensors"):
        convert_v1(GOLDEN / "v1_catalogue.upg", tmp_path / "model.safetensors")
