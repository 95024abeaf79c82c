"""Small files that claim or build more than a machine has; refused without taking it."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest
import scipy.sparse

from upg_jax import FormatError
from upg_jax.io import convert_v1
from upg_jax.io._unpickle import MAX_OPCODES, load


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x",
        b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"x",
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    ],
    ids=["binbytes8", "binunicode8", "bytearray8", "binbytes", "frame", "long4"],
)
def test_a_claimed_length_allocates_nothing(tmp_path, content):
    path = tmp_path / "evil.upg"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)
def test_a_huge_memo_index_allocates_nothing(tmp_path):
    path = tmp_path / "evil.upg"
    path.write_bytes(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 2) + b".")
    tracemalloc.start()
    try:
        assert load(path) is None
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)
def test_tuples_doubled_a_hundred_times_are_never_walked(refused):
    """As a dict's key they would be hashed for ever, as an argument printed for ever."""
    bomb = b"\x80\x02)" + b"".join(b"2\x86" for _ in range(100))
    refused(bomb + b"}" + bomb[2:] + b"Ns.", "dict keys must be plain values; got tuple")
    refused(bomb + b"cnumpy\ndtype\n" + bomb[2:] + b"\x85R.", "got dtype tuple")
    refused(bomb + b"K\x01" + bomb[2:] + b"R.", "calls 1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", ["tensors", "files"])
def test_a_model_of_doubled_tuples_is_refused_at_once(tmp_path, key):
    value: object = ()
    for _ in range(100):
        value = (value, value)
    path = tmp_path / "evil.upg"
    for content in (
        {key: value},
        {key: {"w": value}},
        {key: {"w": {"shape": value, "values": value}}},
        {key: [{"tensors": [{"name": value}]}]},
        {key: {"w": {"shape": (value, value)}}},
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(FormatError) as caught:
            convert_v1(path, tmp_path / "out.safetensors")
        assert len(str(caught.value)) < 1000


@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [3, 1000])
def test_one_array_made_many_times_is_refused(refused, times):
    """A megabyte of bytes, taken from the memo for each of a thousand arrays: a gigabyte."""
    data = b"\x80\x04B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"\x94"
    dtype = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x03>i8\x85R\x94"
    maker = b"\x8c\x12numpy.core.numeric\x8c\x0b_frombuffer\x93\x94"
    call = b"h\x02(h\x00h\x01J" + struct.pack("<i", 1 << 17) + b"\x85\x8c\x01CtR"
    refused(
        data + dtype + maker + b"]" + b"(" + times * call + b"e.", "must not have more bytes than the file"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [3, 1000])
def test_one_text_encoded_many_times_is_refused(refused, times):
    text = b"\x80\x02X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    call = b"c_codecs\nencode\nh\x00\x85R"
    refused(text + b"](" + times * call + b"e.", "must not have more bytes than the file")


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_a_file_of_nothing_but_opcodes_is_refused(refused):
    start = time.monotonic()
    refused(b"\x80\x02](" + b"}" * (MAX_OPCODES + 1) + b"e.", "fewer than 10,000,000 opcodes")
    assert time.monotonic() - start < 100


def test_deep_nesting_is_read_without_recursion(tmp_path):
    path = tmp_path / "deep.upg"
    path.write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    value, depth = load(path), 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == 199_999


@pytest.mark.parametrize("kind", ["dict", "scipy_int8", "scipy_float"])
def test_a_matrix_that_claims_two_thousand_million_rows_allocates_nothing(tmp_path, kind):
    planes = {"shape": (2**31 - 1, 3), "values": np.ones(1, np.int8), "indices": np.zeros(1, np.int32)}
    tensor: object = {**planes, "indptr": np.array([0, 1]), "scales": 1.0}
    if kind != "dict":
        tensor = scipy.sparse.csr_matrix(np.ones((1, 1), np.int8 if kind == "scipy_int8" else np.float32))
        tensor._shape = planes["shape"]
    path = tmp_path / "evil.upg"
    path.write_bytes(pickle.dumps({"tensors": {"w": tensor}}))
    tracemalloc.start()
    try:
        with pytest.raises(
            FormatError, match=r"tensor 'w': there must be one more row pointer than the 2,147"
        ):
            convert_v1(path, tmp_path / "out.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
