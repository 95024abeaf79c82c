"""Every rule of UPG metadata and of MdCSR planes in a file: one crafted file each."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.crafted import Crafted

from upg_jax import FormatError, UPGDecompressor


@pytest.fixture
def write(tmp_path):
    def write(crafted: Crafted):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(crafted.bytes())
        return path

    return write


@pytest.fixture
def refused(write):
    """Checks that a file is refused at a stage, and that the message names the file and says the rest."""

    def check(crafted: Crafted, *expected: str, when: str = "open") -> None:
        path = write(crafted)
        if when == "open":
            with pytest.raises(FormatError) as caught:
                UPGDecompressor.from_safetensors(path)
        else:
            f = UPGDecompressor.from_safetensors(path)
            if when == "verify":
                f.get_layer("w")  # a rule that only the deep check sees
            with pytest.raises(FormatError) as caught:
                f.verify() if when == "verify" else f.get_layer("w")
        for part in (str(path), *expected):
            assert part in str(caught.value)

    return check


def edited(manifold: str = "unit", **planes) -> Crafted:
    crafted = Crafted(manifold)
    for name, plane in planes.items():
        crafted.tensors[f"w.{name}"] = plane
    return crafted


def with_facts(**facts) -> Crafted:
    crafted = Crafted()
    crafted.facts.update(facts)
    return crafted


# -- the file's metadata


@pytest.mark.parametrize("value", [None, "pt", "UPG-MDCSR"])
def test_another_format_is_refused(refused, value):
    crafted = Crafted()
    crafted.metadata.pop("format")
    if value is not None:
        crafted.metadata["format"] = value
    refused(crafted, "'format' must be 'upg-mdcsr'", "upg-jax compress")


@pytest.mark.parametrize("version", ["1.0", "3.0", "20.0", "2", "2.x", "v2.0", "2.0 ", "", "2.\u0660"])
def test_another_version_is_refused(refused, version):
    crafted = Crafted()
    crafted.metadata["version"] = version
    refused(crafted, "reads version 2", repr(version))


def test_a_missing_version_is_refused(refused):
    crafted = Crafted()
    del crafted.metadata["version"]
    refused(crafted, "reads version 2")


def test_a_newer_minor_version_and_unknown_keys_are_read_and_kept(write):
    crafted = Crafted()
    crafted.metadata.update(version="2.7", license="Apache-2.0")
    crafted.facts["from_the_future"] = {"a": [1]}
    f = UPGDecompressor.from_safetensors(write(crafted))
    f.verify()
    assert f.metadata == {"license": "Apache-2.0"}


@pytest.mark.parametrize("key", ["model", "provenance", "mdcsr"])
@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "JSON"), ("[]", "JSON object"), ('{"a":1,"a":2}', "more than once"), ('{"a":NaN}', "NaN")],
)
def test_json_in_the_metadata_is_strict(refused, key, text, said, monkeypatch):
    crafted = Crafted()
    header = crafted.header()
    header["__metadata__"][key] = text
    monkeypatch.setattr(crafted, "header", lambda: header)
    refused(crafted, f"metadata key {key!r}", said)


def test_metadata_without_a_list_of_matrices_is_refused(refused, monkeypatch):
    crafted = Crafted()
    header = crafted.header()
    del header["__metadata__"]["mdcsr"]
    monkeypatch.setattr(crafted, "header", lambda: header)
    refused(crafted, "'mdcsr' is missing")


# -- a matrix's metadata


@pytest.mark.parametrize(
    "key", ["shape", "manifold", "row_alignment", "true_nnz", "index", "value_bits", "dtype"]
)
def test_a_missing_fact_is_refused(refused, key):
    crafted = Crafted()
    del crafted.facts[key]
    refused(crafted, "metadata of 'w'", "must be a JSON object with", key)


@pytest.mark.parametrize("entry", [None, [], "w", 3])
def test_facts_must_be_an_object(refused, entry):
    crafted = Crafted()
    crafted.matrices["w"] = entry
    refused(crafted, "metadata of 'w'", "must be a JSON object with")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("shape", [None, 3, [3], [3, 300, 1], [3, 300.0], [3, True], [-3, 300], [3, 2**31], ["3", "300"]]),
        ("manifold", [None, "", "Unit", 0, ["unit"]]),
        ("row_alignment", [None, 0, 3, -1, 1.0, True, "1", 2**31]),
        ("true_nnz", [None, -1, 5.0, True, "5", 2**31]),
        ("dtype", [None, "float64", "F32", "", 7]),
        ("index", [None, "delta4", "bitmask", 8]),
        ("value_bits", [None, 5, 8.0, "8", True]),
    ],
)
def test_a_bad_fact_is_refused(refused, key, values):
    for value in values:
        refused(with_facts(**{key: value}), "metadata of 'w'", key)


def test_an_unknown_encoding_says_to_upgrade(refused):
    refused(
        with_facts(index="bitmask"),
        "reads index 'delta8', 'mask', 'dense' with value_bits 8",
        "upgrade upg_jax",
    )


def test_more_nonzero_weights_than_entries_are_refused(refused):
    refused(with_facts(true_nnz=7), "tensor 'w'", "true_nnz must be at most")


# -- which tensors there are


@pytest.mark.parametrize("plane", ["values", "delta_indices", "scales", "row_pointers"])
def test_a_missing_plane_is_refused(refused, plane):
    crafted = Crafted()
    del crafted.tensors[f"w.{plane}"]
    refused(crafted, "tensor 'w'", f"{plane} ")


def test_missing_prime_indices_are_refused(refused):
    crafted = Crafted("prime")
    del crafted.tensors["w.prime_indices"]
    refused(crafted, "tensor 'w'", "prime_indices is missing")


def test_prime_indices_on_the_unit_manifold_are_refused(refused):
    crafted = Crafted("prime")
    crafted.facts["manifold"] = "unit"
    refused(crafted, "tensor 'w'", "the unit manifold has no prime_indices")


def test_a_matrix_that_is_dense_too_is_refused(refused):
    crafted = Crafted()
    crafted.tensors["w"] = np.zeros(3, np.float32)
    refused(crafted, "tensor 'w'", "there twice")


def test_planes_without_metadata_are_dense_tensors(write):
    crafted = Crafted()
    crafted.matrices.clear()
    f = UPGDecompressor.from_safetensors(write(crafted))
    assert "w" not in f
    assert set(f.names()) == set(crafted.tensors)


@pytest.mark.parametrize(
    ("plane", "dtype"),
    [
        ("values", np.uint8),
        ("delta_indices", np.int8),
        ("scales", np.uint32),
        ("row_pointers", np.float32),
        ("prime_indices", np.uint32),
    ],
)
def test_a_plane_of_another_dtype_is_refused(refused, plane, dtype):
    crafted = Crafted("prime")
    crafted.tensors[f"w.{plane}"] = crafted.tensors[f"w.{plane}"].astype(dtype)
    refused(crafted, "tensor 'w'", f"{plane} must be")


@pytest.mark.parametrize("plane", ["values", "delta_indices", "scales", "row_pointers", "prime_indices"])
@pytest.mark.parametrize("change", ["short", "long", "matrix", "scalar"])
def test_a_plane_of_another_shape_is_refused(refused, plane, change):
    crafted = Crafted("prime")
    array = crafted.tensors[f"w.{plane}"]
    crafted.tensors[f"w.{plane}"] = {
        "short": array[:-1],
        "long": np.append(array, array[-1:]),
        "matrix": array[None],
        "scalar": array[0].reshape(()),
    }[change]
    refused(crafted, "tensor 'w'", "must be")


def test_plane_lengths_must_be_multiples_of_the_row_alignment(refused):
    refused(with_facts(row_alignment=4), "tensor 'w'", "multiple of row_alignment 4", when="get_layer")


def test_padding_must_be_bytes_of_zeros(refused):
    crafted = Crafted()
    crafted.tensors["__padding__.0"] = np.zeros(4, np.float32)
    refused(crafted, "'__padding__.0'", "must be U8")
    crafted.tensors["__padding__.0"] = np.array([0, 1], np.uint8)
    refused(crafted, "'__padding__.0'", "must be zeros", when="verify")


# -- what could take a kernel out of bounds, and scales: before a layer is handed out


def test_row_pointers_must_start_at_zero(refused):
    planes = edited(row_pointers=np.array([1, 4, 4, 6], np.uint32))
    refused(planes, "tensor 'w'", "must start at 0", when="get_layer")


def test_decreasing_row_pointers_are_refused(refused):
    planes = edited(row_pointers=np.array([0, 4, 3, 6], np.uint32))
    refused(planes, "tensor 'w'", "row 1", "must not decrease", when="get_layer")


@pytest.mark.parametrize("last", [7, 2**31, 2**32 - 1])
def test_row_pointers_past_the_planes_are_refused(refused, last):
    planes = edited(row_pointers=np.array([0, 4, 4, last], np.uint32))
    refused(planes, "tensor 'w'", f"end at {last}", when="get_layer")


def test_unaligned_row_pointers_are_refused(refused):
    crafted = with_facts(row_alignment=2)
    crafted.tensors["w.row_pointers"] = np.array([0, 3, 4, 6], np.uint32)
    refused(crafted, "tensor 'w'", "row 1", "row_alignment 2", when="get_layer")


@pytest.mark.parametrize("row", [0, 2])
def test_a_column_out_of_range_is_refused(refused, row):
    crafted = with_facts(shape=[3, 15 if row == 0 else 299])
    refused(crafted, "tensor 'w'", f"row {row}", "in_features", when="get_layer")


def test_a_filler_out_of_range_is_refused(refused):
    planes = edited(delta_indices=np.array([0, 5, 7, 3, 255, 255], np.uint8))
    refused(planes, "tensor 'w'", "row 2", "reach column 510", when="get_layer")


def test_entries_of_a_matrix_without_columns_are_refused(refused):
    refused(with_facts(shape=[3, 0]), "tensor 'w'", "row 0", "in_features 0", when="get_layer")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 1e-39, 1e35])
def test_a_scale_that_makes_bad_weights_is_refused(refused, scale):
    planes = edited(scales=np.array([0.5, 0, scale], np.float32))
    refused(planes, "tensor 'w'", "row 2", "scales must be", when="get_layer")


def test_every_way_to_a_layer_checks_it(write):
    f = UPGDecompressor.from_safetensors(write(edited(row_pointers=np.array([0, 4, 3, 6], np.uint32))))
    for read in (f.get_layer, f.decompress_layer, lambda name: f.get_stack([name])):
        with pytest.raises(FormatError, match="row 1"):
            read("w")


def test_a_small_file_that_claims_a_huge_matrix_is_not_decoded(write, monkeypatch):
    f = UPGDecompressor.from_safetensors(write(with_facts(shape=[3, 2**31 - 1])))
    f.verify()
    assert f.get_layer("w").shape == (3, 2**31 - 1)
    monkeypatch.setattr("upg_jax.io._reader.total_memory", lambda: 2**34)
    with pytest.raises(FormatError, match=r"tensor 'w': its shape \(3, 2147483647\) must fit the memory"):
        f.decompress_layer("w")


# -- the rest of the format: in the deep check


def test_a_repeated_column_is_found_by_verify(refused):
    planes = edited(delta_indices=np.array([0, 5, 0, 3, 255, 44], np.uint8))
    refused(planes, "tensor 'w'", "row 0", "strictly increase", when="verify")


def test_a_prime_index_out_of_range_is_found_by_verify(refused):
    planes = edited("prime", prime_indices=np.array([0, 10_000, 9999, 4, 0, 77], np.uint16))
    refused(planes, "tensor 'w'", "row 0", "below 10000", when="verify")


def test_a_filler_that_is_none_is_found_by_verify(refused):
    planes = edited(delta_indices=np.array([0, 5, 7, 3, 254, 44], np.uint8))
    refused(planes, "tensor 'w'", "row 2", "delta 255", when="verify")


def test_a_filler_with_a_prime_index_is_found_by_verify(refused):
    planes = edited("prime", prime_indices=np.array([0, 1, 9999, 4, 3, 77], np.uint16))
    refused(planes, "tensor 'w'", "row 2", "filler's prime index", when="verify")


@pytest.mark.parametrize("plane", ["values", "delta_indices", "prime_indices"])
def test_a_tail_that_is_not_zero_is_found_by_verify(refused, plane):
    crafted = Crafted("prime")
    for name in ("values", "delta_indices", "prime_indices"):
        tail = [0, 1] if name == plane else [0, 0]
        array = crafted.tensors[f"w.{name}"]
        crafted.tensors[f"w.{name}"] = np.append(array, np.array(tail, array.dtype))
    refused(crafted, "tensor 'w'", f"{plane} must be zero past", when="verify")


def test_a_wrong_count_of_weights_is_found_by_verify(refused):
    refused(with_facts(true_nnz=4), "tensor 'w'", "true_nnz must be 5", "says 4", when="verify")


def test_a_value_of_minus_128_is_accepted(write):
    planes = edited(values=np.array([-128, -2, 3, -127, 0, 5], np.int8))
    f = UPGDecompressor.from_safetensors(write(planes))
    f.verify()
    assert f.decompress_layer("w")[0, 0] == -64


def test_booleans_of_other_bytes_are_refused(write):
    crafted = Crafted()
    crafted.tensors["mask"] = np.array([0, 1, 2], np.uint8).view(np.bool_)
    f = UPGDecompressor.from_safetensors(write(crafted))
    for read in (f.get_array, lambda name: f.verify()):
        with pytest.raises(FormatError, match="tensor 'mask': BOOL must hold only bytes 0 and 1"):
            read("mask")
