"""Every rule of the safetensors header: one crafted file each, refused by name before anything else is read."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from helpers.crafted import Crafted, join

from upg_jax import FormatError, UPGDecompressor
from upg_jax.io._header import MAX_HEADER_BYTES


@pytest.fixture
def refused(tmp_path):
    """Writes bytes to a file, opens it, and checks what the refusal says; returns the message."""

    def check(content: bytes, *expected: str) -> str:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(FormatError) as caught:
            UPGDecompressor.from_safetensors(path)
        message = str(caught.value)
        for part in (str(path), *expected):
            assert part in message
        assert len(message) < 1000, "a bad file must not choose the length of a message"
        return message

    return check


def with_header(edit) -> bytes:
    """The crafted file with its parsed header changed in place."""
    crafted = Crafted()
    header = crafted.header()
    edit(header)
    return join(json.dumps(header), crafted.data())


def with_entry(name: str, **fields) -> bytes:
    return with_header(lambda header: header[name].update(fields))


def test_the_crafted_file_is_good_until_it_is_changed(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(Crafted().bytes())
    with UPGDecompressor.from_safetensors(path) as f:
        f.verify()
        np.testing.assert_array_equal(f.decompress_layer("w"), Crafted().dense)
        np.testing.assert_array_equal(f.get_array("norm"), np.arange(3, dtype=np.float32))


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_the_header_length_is_refused(refused, size):
    refused(Crafted().bytes()[:size], "8-byte header length", f"{size} bytes")


def test_truncation_anywhere_is_refused(tmp_path):
    whole = Crafted().bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.safetensors.*(truncated|8-byte|begin with)"):
            UPGDecompressor.from_safetensors(path)


def test_bytes_after_the_last_tensor_are_refused(refused):
    refused(Crafted().bytes() + b"\0", "1 bytes follow")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_an_absurd_header_length_is_refused_without_reading_it(refused, length):
    refused(length.to_bytes(8, "little") + b"{}", "header length", f"{length:,}")


def test_a_header_longer_than_the_file_is_refused(refused):
    refused((1000).to_bytes(8, "little") + b"{}", "1,000 bytes does not fit", "truncated")


@pytest.mark.parametrize("header", ["", "[]", " {}", "\n{}", "null", "\ufeff{}"])
def test_a_header_must_begin_with_a_brace(refused, header):
    refused(join(header, b""), "begin with '{'")


@pytest.mark.parametrize("tail", ["\n", "\t", "\0", "x", " \n "])
def test_only_spaces_may_pad_the_header(refused, tail):
    crafted = Crafted()
    refused(join(json.dumps(crafted.header()) + tail, crafted.data()), "end with '}' and spaces only")


def test_spaces_may_pad_the_header(tmp_path):
    crafted = Crafted()
    path = tmp_path / "padded.safetensors"
    path.write_bytes(join(json.dumps(crafted.header()) + " " * 50, crafted.data()))
    UPGDecompressor.from_safetensors(path).verify()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{,}", "valid JSON"),
        ('{"a":}', "valid JSON"),
        ("{} {}", "valid JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "valid JSON"),
        ('{"a":' + "9" * 10_000 + "}", "valid JSON"),
        (b'{"\xff": 1}', "UTF-8"),
        ('{"a": "\x01"}', "valid JSON"),
    ],
    ids=[
        "comma",
        "no-value",
        "two-objects",
        "nan",
        "overflow",
        "infinity",
        "deep",
        "huge-number",
        "utf-8",
        "control",
    ],
)
def test_a_header_must_be_strict_json(refused, header, said):
    refused(join(header, b""), "header", said)


def test_a_duplicate_tensor_is_refused(refused):
    crafted = Crafted()
    header = json.dumps(crafted.header())
    entry = json.dumps(crafted.header()["norm"])
    refused(join(header[:-1] + f', "norm": {entry}}}', crafted.data()), "'norm' more than once")


def test_a_duplicate_field_of_a_tensor_is_refused(refused):
    crafted = Crafted()
    header = json.dumps(crafted.header()).replace('"dtype": "I8"', '"dtype": "I8", "dtype": "I8"')
    refused(join(header, crafted.data()), "'dtype' more than once")


def test_a_duplicate_metadata_key_is_refused(refused):
    crafted = Crafted()
    header = json.dumps(crafted.header()).replace('"version": "2.0"', '"version": "2.0", "version": "2.0"')
    refused(join(header, crafted.data()), "'version' more than once")


@pytest.mark.parametrize("value", [1, None, {"a": "b"}, ["a"], True])
def test_metadata_must_be_strings(refused, value):
    refused(
        with_header(lambda header: header["__metadata__"].update(extra=value)),
        "strings to strings",
        "'extra'",
    )


@pytest.mark.parametrize("value", [None, [], "text", 1])
def test_metadata_must_be_an_object(refused, value):
    refused(
        with_header(lambda header: header.update(__metadata__=value)), "__metadata__ must be a JSON object"
    )


def test_lone_surrogates_are_refused(refused):
    refused(with_header(lambda header: header.update({"\ud800": header.pop("norm")})), "lone surrogates")
    refused(with_header(lambda header: header["__metadata__"].update(a="\udfff")), "lone surrogates")


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_missing_tensor_field_is_refused(refused, missing):
    refused(with_header(lambda header: header["norm"].pop(missing)), "tensor 'norm'", "exactly dtype, shape")


def test_an_unknown_tensor_field_is_refused(refused):
    refused(with_entry("norm", strides=[1]), "tensor 'norm'", "exactly dtype, shape", "strides")


@pytest.mark.parametrize("entry", [None, 1, "F32", ["F32", [3], [0, 12]]])
def test_a_tensor_that_is_no_object_is_refused(refused, entry):
    refused(with_header(lambda header: header.update(norm=entry)), "tensor 'norm'", "exactly dtype, shape")


@pytest.mark.parametrize("dtype", ["f32", "F128", "", None, 7, ["F32"]])
def test_an_unknown_dtype_is_refused(refused, dtype):
    refused(with_entry("norm", dtype=dtype), "tensor 'norm'", "dtype must be one of")


@pytest.mark.parametrize("shape", [None, 3, "3", [3.0], [True], [-3], ["3"], [2**63], [[3]], [1] * 33])
def test_a_bad_shape_is_refused(refused, shape):
    refused(with_entry("norm", shape=shape), "tensor 'norm'", "shape must be at most")


def test_shapes_multiply_exactly(refused):
    # 2**32 * 2**32 is 0 in 64 bits, and the product with the 0 is 0 in any case.
    refused(with_entry("norm", shape=[2**32, 2**32]), "tensor 'norm'", "below 2**63 bytes")
    refused(with_entry("norm", shape=[0, 2**62, 2**62]), "tensor 'norm'", "below 2**63 bytes")
    # NumPy counts bytes, with empty dimensions left out.
    refused(with_entry("norm", shape=[0, 2**61]), "tensor 'norm'", "below 2**63 bytes")
    # 4 * (2**62 + 3) is 12 in 64 bits.
    refused(with_entry("norm", shape=[2**62 + 3]), "tensor 'norm'", "below 2**63 bytes")


@pytest.mark.parametrize(
    "offsets", [None, [], [0], [0, 1, 2], ["0", "12"], [0.0, 12.0], [-12, 0], [True, 12]]
)
def test_bad_offsets_are_refused(refused, offsets):
    refused(with_entry("norm", data_offsets=offsets), "tensor 'norm'", "data_offsets must be two")


def test_offsets_must_fit_the_shape(refused):
    refused(with_entry("norm", shape=[2]), "tensor 'norm'", "does not fill")
    refused(with_entry("norm", dtype="F64"), "tensor 'norm'", "does not fill")
    refused(with_entry("norm", data_offsets=[10, 5]), "tensor 'norm'", "does not fill")


def test_an_offset_past_the_end_of_the_file_is_refused(refused):
    start = 2**40
    refused(
        with_entry("norm", data_offsets=[start, start + 12]), "tensor 'norm'", "inside the file", "truncated"
    )


def test_a_hole_is_refused(refused):
    crafted = Crafted()
    header = crafted.header()
    start, stop = header["norm"]["data_offsets"]
    header["norm"]["data_offsets"] = [start + 4, stop + 4]
    refused(join(json.dumps(header), crafted.data() + bytes(4)), "tensor 'norm'", "a hole")


def test_a_hole_at_the_beginning_is_refused(refused):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}
    refused(join(json.dumps(header), bytes(2)), "tensor 'a'", "a hole")


def test_an_overlap_is_refused(refused):
    crafted = Crafted()
    header = crafted.header()
    start, stop = header["norm"]["data_offsets"]
    header["norm"]["data_offsets"] = [start - 4, stop - 4]
    refused(
        join(json.dumps(header), crafted.data()[:-4]), "tensor 'norm'", "an overlap with 'w.row_pointers'"
    )


def test_two_tensors_on_the_same_bytes_are_refused(refused):
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for name in "ab"}
    refused(join(json.dumps(header), bytes(1)), "an overlap with 'a'")


def test_a_name_of_any_length_does_not_flood_the_message(refused):
    refused(with_header(lambda header: header.update({"n" * 100_000: 1})), "100002 characters")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl", "zip archive"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"\n  <html lang='en'>", "HTML"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        (b"\x80\x02}q\x00X\x07\x00\x00\x00tensors", "pickle"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "upg-jax convert"),
        (b"(dp0\nVtensors\np1\n", "pickle"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
    ids=["lfs", "zip", "html", "html-spaces", "xml", "pickle2", "pickle4", "pickle0", "gguf", "gzip", "hdf5"],
)
def test_other_kinds_of_files_are_named(refused, start, said):
    refused(start + bytes(100), "must be a safetensors file", said)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"holds no \*\.safetensors"):
        UPGDecompressor.from_safetensors(tmp_path)


def test_a_directory_with_two_models_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(Crafted().bytes())
    with pytest.raises(FormatError, match=r"one model; got a\.safetensors, b\.safetensors"):
        UPGDecompressor.from_safetensors(tmp_path)


def test_a_directory_named_like_a_file_is_refused(tmp_path):
    (tmp_path / "dir" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(FormatError, match=r"model\.safetensors: must be a regular file; it is a directory"):
        UPGDecompressor.from_safetensors(tmp_path / "dir")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.timeout(10)
def test_a_fifo_is_refused_and_does_not_block(tmp_path):
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    with pytest.raises(FormatError, match="it is a FIFO"):
        UPGDecompressor.from_safetensors(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="this system has no /dev/zero")
def test_a_device_is_refused():
    with pytest.raises(FormatError, match="/dev/zero: must be a regular file; it is a device"):
        UPGDecompressor.from_safetensors("/dev/zero")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        UPGDecompressor.from_safetensors(tmp_path / "none.safetensors")
