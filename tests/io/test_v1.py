"""Version 1 files made of dicts, NumPy and scipy: converted, compared with the oracle, refused by tensor and
row."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from helpers.layers import matrix
from oracle import mdcsr as oracle

import upg_jax
from upg_jax import FormatError, UPGDecompressor, save
from upg_jax._encode import LARGEST_LEVEL, _levels
from upg_jax.io import convert_v1
from upg_jax.io._v1_verify import HALF_STEP

PRIMES = np.array(oracle.primes())


def pattern(shape=(9, 700), density=0.05, seed=0) -> scipy.sparse.csr_matrix:
    """A sorted CSR pattern with an empty row, a full row, gaps above 255 and the last column."""
    rng = np.random.default_rng(seed)
    keep = rng.random(shape) < density
    keep[1], keep[2], keep[3] = False, True, False
    keep[3, [254, 509, 699]] = True
    return scipy.sparse.csr_matrix(keep)


def entry(seed=0, primes=False, **changes) -> dict:
    """A tensor with absolute columns, as a dict of planes."""
    csr, rng = pattern(seed=seed), np.random.default_rng(seed)
    planes = {
        "shape": csr.shape,
        "values": (rng.integers(1, 128, csr.nnz) * rng.choice([-1, 1], csr.nnz)).astype(np.int8),
        "indices": csr.indices.astype(np.int32),
        "row_pointers": csr.indptr.astype(np.int32),
        "scales": rng.uniform(0.01, 1, csr.shape[0]).astype(np.float32),
    }
    if primes:
        planes["prime_indices"] = rng.integers(0, 10_000, csr.nnz).astype(np.uint16)
    return planes | changes


def with_deltas(planes: dict) -> dict:
    """The same tensor with deltas and fillers, made entry by entry."""
    values, deltas, primes, pointers = [], [], [], [0]
    for row in range(planes["shape"][0]):
        column = 0
        for i in range(planes["row_pointers"][row], planes["row_pointers"][row + 1]):
            gap = planes["indices"][i] - column
            while gap > 255:
                values.append(0), deltas.append(255), primes.append(0)
                gap -= 255
            values.append(planes["values"][i]), deltas.append(gap)
            primes.append(planes["prime_indices"][i] if "prime_indices" in planes else 0)
            column = planes["indices"][i]
        pointers.append(len(values))
    result = {key: planes[key] for key in ("shape", "scales")}
    result |= {"values": np.array(values, np.int8), "delta_indices": np.array(deltas, np.uint8)}
    if "prime_indices" in planes:
        result["prime_indices"] = np.array(primes, np.uint16)
    return result | {"indptr": np.array(pointers, np.int64)}


def dense(planes: dict) -> np.ndarray:
    """What a dict of absolute columns means, by scipy."""
    level = planes["values"].astype(np.int64)
    if "prime_indices" in planes:
        level = level * PRIMES[planes["prime_indices"]]
    csr = scipy.sparse.csr_matrix((level, planes["indices"], planes["row_pointers"]), planes["shape"])
    scales = np.broadcast_to(np.asarray(planes["scales"], np.float32), planes["shape"][0])
    return csr.toarray().astype(np.float32) * scales[:, None]


@pytest.fixture
def convert(tmp_path):
    """Pickles tensors as a version 1 file, converts it, and returns the open result."""

    def convert(tensors: dict, protocol=4, **options) -> UPGDecompressor:
        src, dst = tmp_path / "model.upg", tmp_path / "model.safetensors"
        content = {"model_type": "llama", "source": "tests", "compression_method": "prime_sparse_v1"}
        src.write_bytes(pickle.dumps({**content, "tensors": tensors}, protocol=protocol))
        report = convert_v1(src, dst, **options)
        assert (report.source_bytes, report.written_bytes) == (src.stat().st_size, dst.stat().st_size)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "model.upg"]
        f = UPGDecompressor.from_safetensors(dst)
        f.verify()
        assert report.compressed + report.dense == len(f.names()) == len(tensors)
        return f

    return convert


@pytest.fixture
def refused(tmp_path, convert):
    def check(tensor, *expected: str) -> None:
        with pytest.raises(FormatError) as caught:
            convert({"good": np.ones(3, np.float32), "bad": tensor})
        for part in (str(tmp_path / "model.upg"), "tensor 'bad'", *expected):
            assert part in str(caught.value)
        assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]

    return check


def decoded(f: UPGDecompressor, name: str) -> np.ndarray:
    return oracle.decode_layer(f.get_layer(name, device=False))


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


# -- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": None}, "shape must be two integers"),
        ({"shape": (9,)}, "shape must be two integers"),
        ({"shape": (9, -1)}, "shape must be integers below 2**31"),
        ({"shape": (9, 2**31)}, "shape must be integers below 2**31"),
        ({"shape": (9.0, 700)}, "shape must be integers"),
        ({"shape": (8, 700), "scales": 0.5}, "one more row pointer than the 8 rows; got 10"),
        ({"values": None}, "values must be a NumPy array of int8; got None"),
        ({"values": [1, 2]}, "values must be a NumPy array of int8; got list"),
        ({"values": np.ones(3, np.int16)}, "values must be a vector of int8; got int16"),
        ({"values": np.ones((3, 3), np.int8)}, "values must be a vector of int8; got int8 (3, 3)"),
        ({"values": np.ones(3, np.int8)}, "as many columns as values"),
        ({"indices": None}, "must have either indices or delta_indices; it has neither"),
        ({"delta_indices": np.ones(3, np.uint8)}, "it has indices and delta_indices"),
        ({"indptr": np.ones(3, np.int32)}, "it has row_pointers and indptr"),
        ({"row_pointers": None}, "must have either row_pointers or indptr; it has neither"),
        ({"indices": np.ones(3, np.float32)}, "indices must be a vector of integers; got float32"),
        ({"row_pointers": np.ones(10, np.float64)}, "row_pointers must be a vector of integers"),
        ({"scales": None}, "scales must be one number, or one for each of the 9 rows; got None"),
        ({"scales": "1"}, "scales must be one number"),
        ({"scales": np.ones(8, np.float32)}, "got float32 (8,)"),
        ({"scales": np.ones((9, 1), np.float32)}, "got float32 (9, 1)"),
        ({"scales": np.full(9, np.nan, np.float32)}, "row 0: scales must be"),
        ({"scales": -1.0}, "row 0: scales must be"),
        ({"scales": 1e300}, "row 0: scales must be"),
        ({"prime_indices": np.zeros(3, np.uint16)}, "as many prime_indices as values"),
        ({"prime_indices": np.zeros(3, np.float32)}, "prime_indices must be a vector of integers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_malformed_dict_is_refused(refused, changes, said):
    refused(entry(**changes), said)


@pytest.mark.parametrize(
    ("plane", "edit", "said"),
    [
        ("indices", lambda a: a.__setitem__(-1, 700), "row 8: columns must be in [0, 700); got 700"),
        ("indices", lambda a: a.__setitem__(-1, -1), "row 8: columns must be in [0, 700); got -1"),
        (
            "indices",
            lambda a: a.__setitem__(1, a[0]),
            "row 0: columns of stored weights must strictly increase",
        ),
        ("indices", lambda a: a.__setitem__(slice(0, 2), a[1::-1]), "row 0: columns of stored weights"),
        ("row_pointers", lambda a: a.__setitem__(0, 1), "row pointers must go from 0 to"),
        ("row_pointers", lambda a: a.__setitem__(-1, a[-1] - 1), "row pointers must go from 0 to"),
        ("row_pointers", lambda a: a.__setitem__(-1, a[-1] + 1), "row pointers must go from 0 to"),
        ("row_pointers", lambda a: a.__setitem__(3, 0), "row 2: row pointers must not decrease"),
        (
            "prime_indices",
            lambda a: a.__setitem__(-1, 10_000),
            "row 8: prime_indices must be in [0, 10000); got 10000",
        ),
        ("scales", lambda a: a.__setitem__(4, np.inf), "row 4: scales must be"),
        ("scales", lambda a: a.__setitem__(4, 1e-40), "row 4: scales must be"),
    ],
)
def test_a_malformed_plane_is_refused_by_row(refused, plane, edit, said):
    planes = entry(primes=True)
    edit(planes[plane])
    refused(planes, said)


def test_deltas_that_leave_the_matrix_are_refused_by_row(refused):
    planes = with_deltas(entry())
    planes["delta_indices"][-1] = 255
    refused({**planes, "shape": (9, 500)}, "columns must be in [0, 500)")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_float_matrix_must_be_finite(refused, value):
    csr = scipy.sparse.csr_matrix(np.array([[1.0, 0, 2.0], [0, value, 0]]))
    refused(csr, "row 1, column 1: weights must be finite")


def test_a_float_row_too_large_to_scale_is_refused(refused):
    refused(
        scipy.sparse.csr_matrix(np.array([[1.0], [3e38]], np.float32)),
        "row 1",
        "exceeds the format's largest",
    )


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.bool_])
def test_sparse_matrices_of_other_dtypes_are_refused(refused, dtype):
    refused(scipy.sparse.csr_matrix(np.eye(3, dtype=dtype)), "data must be a vector of int8 or floats")


def test_a_damaged_scipy_matrix_is_refused_by_row(refused):
    csr = scipy.sparse.csr_matrix(np.eye(3, dtype=np.int8))
    csr.indices[2] = 3
    refused(csr, "row 2: columns must be in [0, 3); got 3")


@pytest.mark.parametrize("tensor", [None, 3, "w", [1.0], (np.ones(3),)])
def test_a_tensor_of_another_kind_is_refused(refused, tensor):
    refused(tensor, "must be a dict, a scipy CSR matrix or a NumPy array")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "must hold a dict; got list"),
        (None, "must hold a dict; got None"),
        ({}, "must have 'tensors' (weights) or 'files' (a catalogue); its keys are none"),
        ({"weights": {}}, "its keys are 'weights'"),
        ({"tensors": []}, "'tensors' must be a dict"),
        ({"tensors": {1: np.ones(3)}}, "'tensors' must be a dict of names"),
        ({"tensors": {"__padding__.0": np.ones(3)}}, "reserved by the file format"),
        ({"tensors": {"a": entry(), "a.values": np.ones(3)}}, "both need the name"),
    ],
)
def test_content_of_another_form_is_refused(tmp_path, content, said):
    (tmp_path / "model.upg").write_bytes(pickle.dumps(content))
    with pytest.raises(FormatError) as caught:
        convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors")
    assert said in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_the_source_is_not_overwritten(tmp_path):
    path = tmp_path / "model.upg"
    path.write_bytes(pickle.dumps({"tensors": {}}))
    os.link(path, tmp_path / "link.safetensors")
    for dst in (path, tmp_path / "link.safetensors"):
        with pytest.raises(FormatError, match="must not replace the file it is made from"):
            convert_v1(path, dst)


def test_an_unknown_manifold_is_refused(tmp_path):
    with pytest.raises(FormatError, match="manifold must be one of unit, prime; got 'int8'"):
        convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors", manifold="int8")


# -- verified and atomic


def test_a_mistake_of_the_encoder_is_caught_before_the_file_has_its_name(tmp_path, monkeypatch):
    from upg_jax.io import _v1_matrix

    encode = _v1_matrix.encode_entries
    mistakes = {
        "value": lambda e: e._replace(values=np.where(e.values == 1, 2, e.values).astype(np.int8)),
        "column": lambda e: e._replace(delta_indices=np.maximum(e.delta_indices, 1)),
        "missing": lambda e: e._replace(values=np.where(e.values == 1, 0, e.values).astype(np.int8)),
    }
    q = np.array([[1, 0, 3, 0], [0, 5, 0, 1]], np.int8)
    for tensor in (scipy.sparse.csr_matrix(q), scipy.sparse.csr_matrix(q.astype(np.float32))):
        (tmp_path / "model.upg").write_bytes(pickle.dumps({"tensors": {"w": tensor}}))
        (tmp_path / "model.safetensors").write_text("precious")
        for mistake in mistakes.values():
            if tensor.dtype == np.float32 and mistake is not mistakes["column"]:
                continue
            monkeypatch.setattr(_v1_matrix, "encode_entries", lambda *a, m=mistake, **k: m(encode(*a, **k)))
            with pytest.raises(FormatError, match="tensor 'w': verification: row"):
                convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors")
            assert (tmp_path / "model.safetensors").read_text() == "precious"
            assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stage", ["converting b", "verifying b"])
def test_an_interrupt_leaves_nothing(tmp_path, stage):
    (tmp_path / "model.upg").write_bytes(pickle.dumps({"tensors": {"a": entry(), "b": entry(1)}}))

    def interrupt(message, done, total):
        if message == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors", progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


# -- catalogues


class Source:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict) -> None:
        self.config = {"model_type": "llama", "num_hidden_layers": 1}
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def listed(name: str, shape, sparsity=0.5, manifold=False, **changes) -> dict:
    facts = {"name": name, "shape": shape, "dtype": "float32", "original_bytes": 4, "compressed_bytes": 1}
    facts |= {"compression_method": "prime_sparse_v1", "sparsity_level": sparsity, "quantization": "int8"}
    return {**facts, "manifold_encoded": manifold, **changes}


@pytest.fixture
def checkpoint():
    rng = np.random.default_rng(0)
    return Source(
        {
            "up": rng.standard_normal((40, 30)).astype(np.float32),
            "down": rng.standard_normal((30, 40)).astype(ml_dtypes.bfloat16),
            "full": rng.standard_normal((10, 30)).astype(np.float16),
            "norm": rng.standard_normal(30).astype(np.float32),
            "unlisted": rng.standard_normal((5, 5)).astype(np.float32),
        }
    )


@pytest.fixture
def catalogue(tmp_path):
    def write(*tensors, **content) -> Path:
        files = [{"filename": f"{i}.safetensors", "tensors": [tensor]} for i, tensor in enumerate(tensors)]
        path = tmp_path / "model.upg"
        path.write_bytes(pickle.dumps({"files": files, **content}))
        return path

    return write


def test_a_catalogue_without_its_source_says_how_to_go_on(catalogue, tmp_path):
    path = catalogue(listed("up", (40, 30)), listed("down", (30, 40)))
    with pytest.raises(FormatError) as caught:
        convert_v1(path, tmp_path / "model.safetensors")
    for part in (str(path), "only a catalogue of 2 tensors, no weights", "--source DIR", "open_checkpoint"):
        assert part in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_a_catalogue_with_its_source_is_really_compressed(catalogue, checkpoint, tmp_path):
    path = catalogue(
        listed("up", (40, 30), 0.75),
        listed("down", [30, 40], 0.5, manifold=True),
        listed("full", (10, 30), 0.0, manifold=True),
        listed("norm", (30,), 0.5),
    )
    report = convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)
    assert (report.kind, report.compressed, report.dense) == ("catalogue", 3, 2)
    f = UPGDecompressor.from_safetensors(tmp_path / "model.safetensors")
    f.verify()
    assert f.model == checkpoint.config
    for name, density, manifold in (("up", 0.25, "unit"), ("down", 0.5, "prime"), ("full", 1.0, "prime")):
        original = checkpoint.tensors[name].astype(np.float32)
        info = f.info(name)
        assert (info.manifold, info.dtype) == (manifold, checkpoint.tensors[name].dtype.name)
        w = decoded(f, name)
        threshold = np.sort(np.abs(original), axis=None)[-round(density * original.size)]
        assert (np.abs(original)[w != 0] >= threshold).all()
        assert np.count_nonzero(w) == round(density * original.size)
        largest = np.abs(original).max(axis=1, keepdims=True)
        close = np.abs(w - original) <= np.broadcast_to(largest / 127, w.shape)
        assert close[w != 0].all()
    for name in ("norm", "unlisted"):
        np.testing.assert_array_equal(f.get_array(name), checkpoint.tensors[name])


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (listed("ghost", (1, 1)), "tensor 'ghost': is listed, but the source checkpoint does not have it"),
        (
            listed("up", (30, 40)),
            "tensor 'up': shape must be that of the source checkpoint, (40, 30); got (30, 40)",
        ),
        (listed("up", None), "tensor 'up': shape must be"),
        (listed("up", (40, 30), 50), "tensor 'up': sparsity_level must be a fraction in [0, 1]; got 50"),
        (listed("up", (40, 30), -0.1), "sparsity_level must be a fraction"),
        (listed("up", (40, 30), "half"), "sparsity_level must be a fraction"),
        (listed("up", (40, 30), float("nan")), "sparsity_level must be a fraction"),
        (listed(3, (40, 30)), "must be a dict with a name; got 3"),
        ("up", "must be a dict with a name"),
    ],
)
def test_a_bad_catalogue_entry_is_refused(catalogue, checkpoint, tmp_path, tensor, said):
    path = catalogue(tensor)
    with pytest.raises(FormatError) as caught:
        convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


@pytest.mark.parametrize("files", [None, {}, [1], [{}], [{"tensors": 3}]])
def test_a_bad_list_of_files_is_refused(catalogue, checkpoint, tmp_path, files):
    with pytest.raises(FormatError, match="files"):
        convert_v1(catalogue(files=files), tmp_path / "model.safetensors", source=checkpoint)


def test_a_tensor_listed_twice_is_refused(catalogue, checkpoint, tmp_path):
    path = catalogue(listed("up", (40, 30)), listed("up", (40, 30)))
    with pytest.raises(FormatError, match="tensor 'up': is listed more than once"):
        convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)


def test_a_matrix_that_cannot_be_encoded_is_named(catalogue, checkpoint, tmp_path):
    checkpoint.tensors["up"][3, 4] = np.nan
    with pytest.raises(FormatError, match=r"tensor 'up': .*row 3, column 4"):
        convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "model.safetensors", source=checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: w * np.float32(1.1),
        lambda w: np.where(np.abs(w) == np.abs(w).max(), 0, w),
        lambda w: np.where(w == 0, 0.1, w).astype(np.float32),
        lambda w: w * 0,
    ],
    ids=["scaled", "largest-dropped", "more-kept", "nothing-kept"],
)
def test_a_wrong_compression_is_caught(catalogue, checkpoint, tmp_path, monkeypatch, damage):
    from upg_jax.io import _v1_jobs

    encode = _v1_jobs.encode_dense

    def wrong(w, *, density, manifold):
        pruned = np.asarray(encode(w, density=density, manifold=manifold).to_dense())
        return encode(damage(pruned).astype(np.float32), density=1.0, manifold=manifold)

    monkeypatch.setattr(_v1_jobs, "encode_dense", wrong)
    with pytest.raises(FormatError, match="tensor 'up': verification:"):
        convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "model.safetensors", source=checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_a_catalogue_is_filled_from_a_real_checkpoint(catalogue, tmp_path):
    """A Hugging Face directory through `open_checkpoint`, as the command line does it."""
    import json

    from safetensors.numpy import save_file

    from upg_jax.io import open_checkpoint

    directory = tmp_path / "hf"
    directory.mkdir()
    w = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    save_file({"up": w, "norm": w[0]}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    source = open_checkpoint(directory)
    convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "out.safetensors", source=source)
    f = UPGDecompressor.from_safetensors(tmp_path / "out.safetensors")
    assert f.info("up").true_nnz == 600
    assert f.model["model_type"] == "llama"
    assert f.provenance["sources"][0]["name"] == "model.upg"
    assert len(f.provenance["sources"]) == 1 + len(source.source_files())


def test_a_sharded_model_in_the_way_is_named_before_any_work(tmp_path):
    save(tmp_path / "model.safetensors", {f"w.{i}": np.ones(9) for i in range(3)}, max_shard_bytes=80)
    (tmp_path / "model.upg").write_bytes(b"not even a pickle")
    with pytest.raises(FormatError, match="cannot stand side by side"):
        convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors")
