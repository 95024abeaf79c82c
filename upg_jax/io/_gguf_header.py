"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Parsed here rather than by `gguf.GGUFReader`, which takes two seconds and an array per vocabulary entry, and
loops for as long as a damaged count claims.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._errors import CheckpointError, MissingDependencyError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where in the file a tensor lies; `shape` is in NumPy order, `kind` a `gguf.GGMLQuantizationType`."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """Offset of the first byte after the tensor."""
        return self.start + self.nbytes


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata, and tensors by their GGUF names."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def import_gguf() -> Any:
    """The `gguf` package, or an error that says how to install it."""
    try:
        import gguf
    except ImportError as e:
        raise MissingDependencyError(
            'reading a GGUF file needs the package gguf; pip install "upg-jax[hf]"'
        ) from e
    return gguf


def read_header(path: Path) -> GGUFHeader:
    """Reads everything but the tensors' data from a file that begins with the GGUF magic.

    Raises:
        CheckpointError: naming the file and the rule it breaks.
    """
    try:
        return _Parser(path, np.memmap(path, np.uint8, mode="r").data).header()
    except (struct.error, IndexError) as e:
        raise CheckpointError(f"{path}: ends inside the header; the file is truncated or damaged") from e
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path}: a string of the header is not UTF-8 ({e})") from e


class _Parser:
    """A cursor over the header; reading past the end of the file raises `struct.error`."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.view = data
        self.position = 4
        self.gguf = import_gguf()

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            # A big-endian file's version has its bytes swapped.
            kind = "big-endian" if version and version & 0xFFFF == 0 else f"GGUF version {version}"
            raise CheckpointError(
                f"{self.path}: is {kind}; this build reads little-endian versions {VERSIONS}"
            )
        num_tensors, num_metadata = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self.string()
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("I"), key)
        described = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment must be a power of two; got {alignment!r}")
        begin = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for t in described:  # their offsets count from where the data begin
            if t.name in tensors:
                raise CheckpointError(f"{self.path}: tensor {t.name!r} appears twice")
            t = dataclasses.replace(t, start=begin + t.start)
            if t.stop > self.view.nbytes:
                raise CheckpointError(
                    f"{self.path}: tensor {t.name!r} needs bytes {t.start:,} to {t.stop:,} of a file of "
                    f"{self.view.nbytes:,}; the file is truncated, fetch it again"
                )
            tensors[t.name] = t
        return GGUFHeader(metadata, tensors)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.view, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > self.view.nbytes - self.position:
            raise struct.error("string past the end")
        start, self.position = self.position, self.position + length
        return bytes(self.view[start : self.position]).decode("utf-8")

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element == _STRING:
                return [self.string() for _ in range(count)]
            if element in _SCALARS:
                if count > self.view.nbytes:
                    raise struct.error("array past the end")
                values = struct.unpack_from(f"<{count}{_SCALARS[element]}", self.view, self.position)
                self.position += struct.calcsize("<" + _SCALARS[element]) * count
                return list(values)
            kind = element
        raise CheckpointError(f"{self.path}: metadata {key!r} is of unknown type {kind}")

    def tensor(self) -> GGUFTensor:
        name = self.string()
        num_dimensions = self.scalar("I")
        if num_dimensions > 4:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} claims {num_dimensions} dimensions; at most 4"
            )
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))[::-1]
        raw_kind, offset = self.scalar("I"), self.scalar("Q")
        try:
            kind = self.gguf.GGMLQuantizationType(raw_kind)
            block, block_bytes = self.gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as e:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {raw_kind}, which the installed gguf package does "
                "not know; a newer one may: pip install --upgrade gguf"
            ) from e
        if (shape[-1] if shape else 1) % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of type {kind.name} has rows of {shape[-1]} weights, not a "
                f"multiple of its block of {block}"
            )
        return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)
