"""The `__metadata__` of a version 2 file: what it says of the whole file and of each matrix."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, get_args

from upg_jax._entries import MAX_ENTRIES
from upg_jax._errors import FormatError
from upg_jax._index import INDEXES, Index, index_bytes
from upg_jax._mdcsr import DTYPES, PLANES, Manifold
from upg_jax._values import GROUP_SIZES, VALUE_BITS, groups_of, value_bytes
from upg_jax.io._header import StoredTensor, show, strict_json

FORMAT = "upg-mdcsr"
VERSION = "2.0"
NARROW_VERSION = "2.1"  # of files that have values of fewer than 8 bits
RESERVED = ("format", "version", "mdcsr", "model", "provenance")
PADDING_PREFIX = "__padding__."


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixFacts:
    """What the metadata says of one compressed matrix."""

    shape: tuple[int, int]
    manifold: Manifold
    row_alignment: int
    true_nnz: int
    index: Index
    value_bits: int
    dtype: str
    group_size: int | None = None

    @property
    def padded_planes(self) -> tuple[str, ...]:
        """The planes that a tail of zeros may follow, of as many elements each."""
        return ("values", "delta_indices", "prime_indices")[:: 1 if self.index == "delta8" else 2]

    def plane_shapes(self, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of each plane, the bulky ones first, for planes of `length` entries."""
        planes: dict[str, tuple[str, tuple[int, ...]]] = {
            "values": ("I8", (value_bytes(length, self.value_bits),)),
            "delta_indices": ("U8", (index_bytes(self.index, self.shape, length),)),
        }
        if self.manifold == "prime":
            planes["prime_indices"] = ("U16", (length,))
        if self.group_size is not None:
            planes["group_scales"] = ("U8", (self.shape[0] * groups_of(self.shape[1], self.group_size),))
        planes["scales"] = ("F32", (self.shape[0],))
        planes["row_pointers"] = ("U32", (self.shape[0] + 1,))
        return planes

    def to_json(self) -> dict[str, Any]:
        """Plain values; without a group size where there are no groups."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class FileFacts:
    """The checked metadata of one file."""

    matrices: dict[str, MatrixFacts]
    model: dict[str, Any] | None
    provenance: dict[str, Any] | None
    other: dict[str, str]


def to_strings(
    matrices: dict[str, MatrixFacts],
    metadata: dict[str, str],
    model: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
) -> dict[str, str]:
    """Builds `__metadata__`; the caller has checked `metadata`."""
    narrow = any(facts.value_bits != 8 for facts in matrices.values())
    strings = {"format": FORMAT, "version": NARROW_VERSION if narrow else VERSION}
    strings["mdcsr"] = json.dumps({name: facts.to_json() for name, facts in matrices.items()})
    for key, value in (("model", model), ("provenance", provenance)):
        if value is not None:
            try:
                strings[key] = json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise FormatError(f"save: {key} must be JSON values; {error}") from None
    return strings | metadata


def from_strings(metadata: dict[str, str], path: object) -> FileFacts:
    """Checks and parses `__metadata__`; unknown keys are kept in `other`.

    Raises:
        FormatError: naming the file and the rule.
    """
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{path}: metadata key 'format' must be {FORMAT!r}; got {show(metadata.get('format'))}; a plain "
            "safetensors checkpoint is compressed with `upg-jax compress`"
        )
    version = metadata.get("version", "")
    if not re.fullmatch(r"2\.\d{1,9}", version, re.ASCII):
        raise FormatError(
            f"{path}: this build reads version 2 files; got version {show(version)}; upgrade upg_jax"
        )
    entries = _json_object(metadata, "mdcsr", path)
    if entries is None:
        raise FormatError(f"{path}: metadata key 'mdcsr' is missing")
    return FileFacts(
        matrices={name: _matrix(name, entry, path) for name, entry in entries.items()},
        model=_json_object(metadata, "model", path),
        provenance=_json_object(metadata, "provenance", path),
        other={key: value for key, value in metadata.items() if key not in RESERVED},
    )


def _json_object(metadata: dict[str, str], key: str, path: object) -> dict[str, Any] | None:
    if key not in metadata:
        return None
    value = strict_json(metadata[key], f"{path}: metadata key {key!r}")
    if not isinstance(value, dict):
        raise FormatError(f"{path}: metadata key {key!r} must hold a JSON object; got {show(value)}")
    return value


def _matrix(name: str, entry: Any, path: object) -> MatrixFacts:
    where = f"{path}: metadata of {show(name)}"
    keys = [field.name for field in dataclasses.fields(MatrixFacts) if field.name != "group_size"]
    if not isinstance(entry, dict) or not entry.keys() >= set(keys):
        raise FormatError(f"{where}: must be a JSON object with {', '.join(keys)}; got {show(entry)}")
    bits = entry["value_bits"]
    if entry["index"] not in INDEXES or type(bits) is not int or bits not in VALUE_BITS:
        raise FormatError(
            f"{where}: this build reads index {', '.join(map(repr, INDEXES))} with value_bits "
            f"{', '.join(map(str, VALUE_BITS))}; got {show(entry['index'])} with {show(bits)}; upgrade upg_jax"
        )
    rules = {
        "shape": ("two integers below 2**31", _is_shape),
        "manifold": ("'unit' or 'prime'", lambda value: value in get_args(Manifold)),
        "row_alignment": ("a power of two", lambda value: _is_count(value) and value.bit_count() == 1),
        "true_nnz": ("a count below 2**31", _is_count),
        "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
    }
    for key, (rule, holds) in rules.items():
        if not holds(entry[key]):
            raise FormatError(f"{where}: {key} must be {rule}; got {show(entry[key])}")
    values = {key: entry[key] for key in keys} | {"shape": tuple(entry["shape"])}
    if bits != 8:
        values["group_size"] = entry.get("group_size")
        if type(values["group_size"]) is not int or values["group_size"] not in GROUP_SIZES:
            raise FormatError(
                f"{where}: group_size must be one of {', '.join(map(str, GROUP_SIZES))} with value_bits {bits}; got "
                f"{show(values['group_size'])}"
            )
    if bits != 8 and entry["manifold"] != "unit":
        raise FormatError(f"{where}: the {entry['manifold']} manifold has value_bits 8; got {bits}")
    return MatrixFacts(**values)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ENTRIES


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def check_planes(stored: Mapping[str, StoredTensor], name: str, facts: MatrixFacts, path: object) -> None:
    """Checks that a file has the planes that its metadata says, of the right dtypes and shapes.

    Raises:
        FormatError: naming the file, the tensor and the rule.
    """
    where = f"{path}: tensor {show(name)}"
    values = stored.get(f"{name}.values")
    length = values.shape[0] * 8 // facts.value_bits if values is not None and len(values.shape) == 1 else 0
    expected = facts.plane_shapes(length)
    for plane in PLANES:
        tensor = stored.get(f"{name}.{plane}")
        if plane not in expected:
            if tensor is not None:
                has_none = (
                    f"value_bits {facts.value_bits}" if plane == "group_scales" else "the unit manifold"
                )
                raise FormatError(f"{where}: {has_none} has no {plane}; the file has them")
            continue
        if tensor is None:
            raise FormatError(f"{where}: the metadata lists it but {plane} is missing")
        if (tensor.dtype, tensor.shape) != expected[plane]:
            dtype, shape = expected[plane]
            raise FormatError(f"{where}: {plane} must be {dtype} {shape}; got {tensor.dtype} {tensor.shape}")
    if facts.true_nnz > length:
        raise FormatError(
            f"{where}: true_nnz must be at most the planes' length {length:,}; got {facts.true_nnz:,}"
        )
