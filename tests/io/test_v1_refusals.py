"""Version 1 files that break a rule, refused by tensor and row; and conversions that fail half-way."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.sparse
from helpers.v1 import entry, with_deltas

from upg_jax import FormatError, UPGDecompressor, save
from upg_jax.io import convert_v1


def v1_file(directory):
    path = directory / "model.upg"
    path.write_bytes(pickle.dumps({"tensors": {"a": np.ones(3, np.float32)}}))
    return path


@pytest.fixture
def refused(tmp_path, convert):
    def check(tensor, *expected: str) -> None:
        with pytest.raises(FormatError) as caught:
            convert({"good": np.ones(3, np.float32), "bad": tensor})
        for part in (str(tmp_path / "model.upg"), "tensor 'bad'", *expected):
            assert part in str(caught.value)
        assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]

    return check


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
                convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors", force=True)
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


def test_an_interrupt_while_temporary_files_are_removed_leaves_none(tmp_path, monkeypatch):
    src = v1_file(tmp_path)
    remove, calls = shutil.rmtree, []

    def interrupted(directory, **options):
        calls.append(directory)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(directory, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_v1(src, tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    src, dst = v1_file(tmp_path), tmp_path / "model.safetensors"
    dst.write_text("precious")
    with pytest.raises(FormatError, match=r"model\.safetensors exists already; .* --force \(force=True\)"):
        convert_v1(src, dst)
    assert dst.read_text() == "precious"
    convert_v1(src, dst, force=True)
    with UPGDecompressor.from_safetensors(dst) as f:
        assert f.names() == ["a"]


def test_a_file_that_appears_during_the_conversion_is_not_replaced(tmp_path):
    src, dst = v1_file(tmp_path), tmp_path / "model.safetensors"
    with pytest.raises(FormatError, match="exists already"):
        convert_v1(src, dst, progress=lambda *ignored: dst.write_text("another run's"))
    assert dst.read_text() == "another run's"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "model.upg"]


def test_a_sharded_model_in_the_way_is_named_before_any_work(tmp_path):
    save(tmp_path / "model.safetensors", {f"w.{i}": np.ones(9) for i in range(3)}, max_shard_bytes=80)
    (tmp_path / "model.upg").write_bytes(b"not even a pickle")
    with pytest.raises(FormatError, match="cannot stand side by side"):
        convert_v1(tmp_path / "model.upg", tmp_path / "model.safetensors")
