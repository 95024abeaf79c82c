"""Version 1 files made of dicts, NumPy and scipy, converted and compared with the oracle."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from helpers.layers import matrix
from helpers.v1 import decoded, dense, entry, pattern, with_deltas

import upg_jax
from upg_jax._quantize import LARGEST_LEVEL, _levels
from upg_jax.io._v1_verify import HALF_STEP

# -- exact kinds


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("primes", [False, True])
def test_dicts_of_planes_keep_every_bit(convert, protocol, primes):
    tensors = {
        "absolute": entry(primes=primes),
        "deltas": with_deltas(entry(1, primes)),
        "one_scale": entry(2, primes, scales=0.25),
        "array_scale": entry(3, primes, scales=np.array(0.25)),
    }
    f = convert(tensors, protocol)
    expected = [
        entry(0, primes),
        entry(1, primes),
        entry(2, primes, scales=0.25),
        entry(3, primes, scales=0.25),
    ]
    for name, planes in zip(tensors, expected, strict=True):
        assert f.info(name).manifold == ("prime" if primes else "unit")
        np.testing.assert_array_equal(decoded(f, name), dense(planes))


def test_other_integer_widths_and_names_are_read(convert):
    planes = entry(primes=True)
    wide = {**planes, "indices": planes["indices"].astype(np.int64)}
    wide["indptr"] = wide.pop("row_pointers").astype(np.uint64)
    wide["prime_indices"] = wide["prime_indices"].astype(np.int32)
    wide["scales"] = wide["scales"].astype(np.float64)
    wide["shape"] = list(wide["shape"])
    big_endian = {
        **planes,
        "indices": planes["indices"].astype(">i4"),
        "scales": planes["scales"].astype(">f4"),
    }
    f = convert({"wide": wide, "big": big_endian})
    for name in f.names():
        np.testing.assert_array_equal(decoded(f, name), dense(planes))


def test_zeros_are_dropped_and_minus_128_is_kept(convert):
    planes = entry()
    planes["values"][::3] = 0
    planes["values"][1] = -128
    f = convert({"w": planes})
    np.testing.assert_array_equal(decoded(f, "w"), dense(planes))
    assert f.info("w").true_nnz == np.count_nonzero(planes["values"])


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_int8_scipy_matrices_keep_every_value(convert, kind):
    planes = entry()
    csr = kind((planes["values"], planes["indices"], planes["row_pointers"]), planes["shape"])
    f = convert({"w": csr})
    np.testing.assert_array_equal(decoded(f, "w"), csr.toarray())


def test_dense_arrays_stay_as_they_are(convert):
    arrays = {
        "norm": np.arange(5, dtype=np.float16),
        "embed": np.asfortranarray(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)),
        "ids": np.array([2**40, 1]),
        "scalar": np.array(1.5, np.float32),
        "big": np.arange(3, dtype=">f4"),
    }
    f = convert(arrays)
    for name, array in arrays.items():
        back = f.get_array(name, device=False)
        assert back.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        ("zero", (0, 5)),
        *itertools.product(
            ("random", "full", "empty_rows", "full_row", "last_column", "zero"), ((1, 1), (3, 1), (33, 67))
        ),
    ],
)
def test_awkward_matrices_survive(convert, structure, shape):
    w = matrix(structure, shape, np.random.default_rng(0))
    q = np.clip(np.round(w * 100), -127, 127).astype(np.int8)
    csr = scipy.sparse.csr_matrix(q)
    planes = {"shape": shape, "values": csr.data, "indices": csr.indices, "indptr": csr.indptr, "scales": 1.0}
    f = convert({"dict": planes, "scipy": csr})
    for name in ("dict", "scipy"):
        np.testing.assert_array_equal(decoded(f, name), q)


# -- floats


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_scipy_matrices_are_quantized_to_half_a_step(convert, manifold, dtype):
    csr = pattern().astype(dtype)
    csr.data = np.random.default_rng(0).standard_normal(csr.nnz).astype(dtype)
    csr.data[5] = 0
    f = convert({"w": csr}, manifold=manifold)
    layer = f.get_layer("w", device=False)
    assert layer.manifold == manifold
    original = csr.toarray().astype(np.float32)
    largest = np.abs(original).max(axis=1, keepdims=True)
    relative = np.abs(decoded(f, "w") - original) / np.maximum(largest, 1e-30)
    # Half of 1/127; on the prime manifold half the widest gap, and a rounding of float32.
    assert relative.max() <= (0.5 / 127 + 2**-23 if manifold == "unit" else 2667 / LARGEST_LEVEL + 2**-23)


def test_half_precision_is_remembered_as_the_original_dtype(convert):
    """scipy makes no float16 matrices, but a pickle's planes can be."""
    csr = pattern().astype(np.float32)
    csr.data = np.ones(csr.nnz, np.float16)
    f = convert({"w": csr})
    assert f.info("w").dtype == "float16"


def test_rows_too_small_to_scale_become_zero(convert):
    csr = scipy.sparse.csr_matrix(np.array([[1.0, 2.0], [1e-40, 0]], np.float32))
    f = convert({"w": csr})
    np.testing.assert_array_equal(decoded(f, "w")[1], 0)


def test_the_widest_half_gap_between_levels_is_what_verification_allows():
    assert np.diff(_levels().product).max() / 2 == HALF_STEP["prime"]


# -- what goes with it


def test_provenance_says_where_it_comes_from(convert, tmp_path):
    f = convert({"w": entry()})
    source = (tmp_path / "model.upg").read_bytes()
    assert f.provenance == {
        "tool": f"upg_jax {upg_jax.__version__}",
        "settings": {"operation": "convert", "manifold": "unit"},
        "sources": [
            {"name": "model.upg", "bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
        ],
        "v1": {"model_type": "llama", "source": "tests", "compression_method": "prime_sparse_v1"},
    }


def test_progress_announces_memory_and_every_tensor(convert):
    said = []
    convert({"a": entry(), "b": np.ones(3)}, progress=lambda *report: said.append(report))
    assert "whole: needs" in said[0][0]
    assert "bytes of memory" in said[0][0]
    expected = [
        (f"{stage} {name}", i, 2) for stage in ("converting", "verifying") for i, name in enumerate("ab")
    ]
    assert said[1:-1] == expected
    assert said[-1] == ("done", 2, 2)


def test_conversion_needs_no_scipy(tmp_path):
    (tmp_path / "model.upg").write_bytes(pickle.dumps({"tensors": {"w": pattern().astype(np.float32)}}))
    script = """
import sys
sys.modules["scipy"] = None
from upg_jax.io import convert_v1
print(convert_v1(sys.argv[1], sys.argv[2]).compressed)
"""
    paths = [str(tmp_path / "model.upg"), str(tmp_path / "out.safetensors")]
    result = subprocess.run(
        [sys.executable, "-c", script, *paths],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(upg_jax.__file__).parents[1],
    )
    assert (result.stdout, result.stderr) == ("1\n", "")
