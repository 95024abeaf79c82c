"""A strict parser of safetensors headers; it trusts nothing that a file claims.

The format: eight bytes with the header's length (little endian), a JSON header, then the data section. The
stock parser accepts duplicate keys, leading white space and unknown fields; this one does not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections import Counter
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from upg_jax._errors import FormatError
from upg_jax.io._open import looks_like

MAX_HEADER_BYTES = 100_000_000  # the stock parser's limit
METADATA_KEY = "__metadata__"

_MAX_RANK = 32  # what every NumPy can hold
_MAX_SHOWN = 120


def _numpy_dtype(name: str) -> np.dtype | None:
    scalar = getattr(ml_dtypes, name, None)
    return None if scalar is None else np.dtype(scalar)


# name -> (bits of an element, its NumPy dtype or None where NumPy has none of that layout)
DTYPES: dict[str, tuple[int, np.dtype | None]] = {
    "BOOL": (8, np.dtype(np.bool_)),
    "U8": (8, np.dtype(np.uint8)),
    "I8": (8, np.dtype(np.int8)),
    "U16": (16, np.dtype("<u2")),
    "I16": (16, np.dtype("<i2")),
    "U32": (32, np.dtype("<u4")),
    "I32": (32, np.dtype("<i4")),
    "U64": (64, np.dtype("<u8")),
    "I64": (64, np.dtype("<i8")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, _numpy_dtype("bfloat16")),
    "F32": (32, np.dtype("<f4")),
    "F64": (64, np.dtype("<f8")),
    "C64": (64, np.dtype("<c8")),
    "F8_E4M3": (8, _numpy_dtype("float8_e4m3fn")),
    "F8_E5M2": (8, _numpy_dtype("float8_e5m2")),
    "F8_E4M3FNUZ": (8, _numpy_dtype("float8_e4m3fnuz")),
    "F8_E5M2FNUZ": (8, _numpy_dtype("float8_e5m2fnuz")),
    "F8_E8M0": (8, _numpy_dtype("float8_e8m0fnu")),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
CODE_OF = {dtype: code for code, (_, dtype) in DTYPES.items() if dtype is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file; `start` and `stop` are offsets into the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """A checked header: its tensors cover the data section exactly, without holes or overlaps."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int


def show(value: object) -> str:
    """`repr` for messages, bounded: a bad file chooses the value."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def strict_json(text: bytes | str, where: str) -> Any:
    """Parses JSON, refusing duplicate keys, NaN, infinity (1e999 too), invalid UTF-8 and lone surrogates.

    Raises:
        FormatError: beginning with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{where}: a JSON object has the key {show(key)} more than once")
        return found

    def refuse(constant: str) -> None:
        raise FormatError(f"{where}: JSON must not contain {constant}")

    def finite(number: str) -> float:
        if math.isinf(float(number)):
            refuse(show(number))
        return float(number)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: must be valid JSON in UTF-8; {error}") from None


def read_header(file: BinaryIO, path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of an open safetensors file.

    Args:
        file: a regular file, positioned anywhere.
        path: what to call it in messages.

    Raises:
        FormatError: naming the file, the tensor and the rule.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8) or start[8:9] != b"{":
        raise FormatError(_not_a_header(path, start, size, length))
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise FormatError(f"{path}: the file became shorter while its header was read")
    text = raw.rstrip(b" ")
    if not text.endswith(b"}"):
        raise FormatError(f"{path}: header must end with '}}' and spaces only; got {show(text[-8:])}")
    fields = strict_json(text, f"{path}: header")
    metadata = _metadata(fields.pop(METADATA_KEY, {}), path)
    tensors = {name: _tensor(name, entry, 8 + length, path) for name, entry in fields.items()}
    _check_coverage(tensors, 8 + length, size, path)
    return Header(tensors, metadata, 8 + length)


def _not_a_header(path: str | os.PathLike[str], start: bytes, size: int, length: int) -> str:
    known = looks_like(start)
    if known is not None:
        return f"{path}: must be a safetensors file; it is {known}"
    if size < 8:
        return f"{path}: must begin with an 8-byte header length; the file has {size} bytes: truncated?"
    if length > MAX_HEADER_BYTES:
        return f"{path}: header length must be at most {MAX_HEADER_BYTES:,}; the file says {length:,}"
    if length > size - 8:
        return f"{path}: header of {length:,} bytes does not fit the file's {size:,}: truncated?"
    return f"{path}: header must begin with '{{'; got {show(start[8:16])}"


def check_text(text: str, where: str) -> None:
    """Refuses text that has no UTF-8 form.

    Raises:
        FormatError: beginning with `where`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{where}: text must not contain lone surrogates; got {show(text)}") from None


def _metadata(metadata: Any, path: str | os.PathLike[str]) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: {METADATA_KEY} must be a JSON object; got {show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(
                f"{path}: {METADATA_KEY} must map strings to strings; {show(key)} is {show(value)}"
            )
        check_text(key, f"{path}: {METADATA_KEY}")
        check_text(value, f"{path}: {METADATA_KEY}")
    return metadata


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(name: str, entry: Any, data_start: int, path: str | os.PathLike[str]) -> StoredTensor:
    where = f"{path}: tensor {show(name)}"
    check_text(name, where)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: must have exactly dtype, shape and data_offsets; got {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: dtype must be one of {', '.join(DTYPES)}; got {show(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        raise FormatError(
            f"{where}: shape must be at most {_MAX_RANK} non-negative integers; got {show(shape)}"
        )
    # NumPy's limit, for empty arrays too.
    if math.prod(max(n, 1) for n in shape) * DTYPES[dtype][0] >= 8 * 2**63:
        raise FormatError(f"{where}: shape must stay below 2**63 bytes; got {show(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FormatError(f"{where}: data_offsets must be two non-negative integers; got {show(offsets)}")
    start, stop = offsets
    if 8 * (stop - start) != math.prod(shape) * DTYPES[dtype][0]:
        raise FormatError(
            f"{where}: data_offsets must span the tensor's bytes exactly; {dtype} of shape {show(shape)} "
            f"does not fill [{start}, {stop})"
        )
    return StoredTensor(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_coverage(
    tensors: dict[str, StoredTensor], data_start: int, size: int, path: str | os.PathLike[str]
) -> None:
    in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    end = max((tensor.stop for tensor in tensors.values()), default=data_start)
    if end > size:
        name = max(tensors, key=lambda name: tensors[name].stop)
        raise FormatError(
            f"{path}: tensor {show(name)}: data must lie inside the file; it ends at byte {end:,}, the file "
            f"at {size:,}: truncated?"
        )
    first = ("", StoredTensor("U8", (0,), data_start, data_start))
    for (before, left), (name, right) in itertools.pairwise([first, *in_order]):
        if right.start != left.stop:
            what = "a hole" if right.start > left.stop else f"an overlap with {show(before)}"
            raise FormatError(
                f"{path}: tensor {show(name)}: data must follow the previous tensor's; there is {what} "
                f"between bytes {min(left.stop, right.start):,} and {max(left.stop, right.start):,}"
            )
    if end < size:
        raise FormatError(f"{path}: the file must end with its last tensor; {size - end:,} bytes follow")
