"""UPG files made byte by byte from docs/format.md, so that a test can break exactly one rule."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

CODES = {"int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "float32": "F32", "bool": "BOOL"}


class Crafted:
    """A valid file with one matrix `w` (3 x 300) and one dense tensor `norm`, to be changed at will.

    Row 0 has the columns 0, 5, 12, 15; row 1 is empty; row 2 has column 299, behind a filler.
    """

    def __init__(self, manifold: str = "unit") -> None:
        self.tensors: dict[str, np.ndarray] = {
            "w.values": np.array([1, -2, 3, -127, 0, 5], np.int8),
            "w.delta_indices": np.array([0, 5, 7, 3, 255, 44], np.uint8),
            "w.scales": np.array([0.5, 0, 2], np.float32),
            "w.row_pointers": np.array([0, 4, 4, 6], np.uint32),
            "norm": np.arange(3, dtype=np.float32),
        }
        if manifold == "prime":
            self.tensors["w.prime_indices"] = np.array([0, 1, 9999, 4, 0, 77], np.uint16)
        self.facts: dict[str, Any] = {
            "shape": [3, 300],
            "manifold": manifold,
            "row_alignment": 1,
            "true_nnz": 5,
            "index": "delta8",
            "value_bits": 8,
            "dtype": "float32",
        }
        self.matrices: dict[str, Any] = {"w": self.facts}
        self.metadata: dict[str, Any] = {"format": "upg-mdcsr", "version": "2.0"}

    @property
    def dense(self) -> np.ndarray:
        """The matrix of the unit manifold."""
        w = np.zeros((3, 300), np.float32)
        w[0, [0, 5, 12, 15]] = np.array([1, -2, 3, -127]) * 0.5
        w[2, 299] = 10
        return w

    def header(self) -> dict[str, Any]:
        """The JSON header, with tensors in the order of `self.tensors`."""
        header: dict[str, Any] = {"__metadata__": {**self.metadata, "mdcsr": json.dumps(self.matrices)}}
        offset = 0
        for name, array in self.tensors.items():
            header[name] = {
                "dtype": CODES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        return header

    def data(self) -> bytes:
        """The data section."""
        return b"".join(array.tobytes() for array in self.tensors.values())

    def bytes(self) -> bytes:
        """The whole file."""
        return join(json.dumps(self.header()), self.data())


def join(header: str | bytes, data: bytes) -> bytes:
    """A file with any header and any data."""
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data
