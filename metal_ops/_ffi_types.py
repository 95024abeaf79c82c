"""Memory layout of XLA's typed FFI, as far as a handler on the CPU needs it.

From `xla/ffi/api/c_api.h`, which jaxlib ships; unchanged from API 0.1 (jaxlib 0.5.0) to 0.5 (jaxlib 0.12), and only
ever extended at the end of a struct. Frames are read with `struct` and not with `ctypes` structures: a call has a dozen
operands, and this takes a third of the time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import struct
from typing import Any, NamedTuple

EXECUTE = 3
METADATA_EXTENSION = 1
API_VERSION = (0, 1)
CANCELLED, INTERNAL = 1, 13

# struct_size, extension_start, api, context, stage; then twice (struct_size, extension, count, types, pointers).
_FRAME = struct.Struct("=QQQQi4x QQqQQ QQqQQ")
# struct_size, extension, dtype, data, rank, dims.
_BUFFER = struct.Struct("=QQi4xQqQ")
_EXTENSION = struct.Struct("=Qi4xQ")

# XLA_FFI_Metadata: struct_size, then an XLA_FFI_Api_Version (struct_size, extension, major, minor), then traits.
_VERSION_OFFSET = 8 + 16
_TRAITS_OFFSET = 8 + 24

_DTYPES = {
    1: ("bool", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("uint8", 1),
    7: ("uint16", 2),
    8: ("uint32", 4),
    9: ("uint64", 8),
    10: ("float16", 2),
    11: ("float32", 4),
    12: ("float64", 8),
    16: ("bfloat16", 2),
}


class Array(NamedTuple):
    """A dense row-major array in host memory, valid during the call.

    Attributes:
        address: of its first element.
        shape: its dimensions.
        dtype: NumPy's name of its elements, or `"bfloat16"`.
        nbytes: its size.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One execution of a custom call. Static attributes are not read: what a kernel needs is in the arrays' shapes.

    Attributes:
        operands: to read.
        results: to write.
    """

    operands: list[Array]
    results: list[Array]


class ErrorArguments(ctypes.Structure):
    """`XLA_FFI_Error_Create_Args`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


_CREATE_ERROR = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ErrorArguments))
# XLA_FFI_Api: struct_size, extension_start, api_version (24 bytes), internal_api, and then the first function.
_CREATE_ERROR_OFFSET = 8 + 8 + 24 + 8


def read_frame(address: int) -> tuple[int, int, int, tuple[int, ...]]:
    """Returns a frame's extension, API and stage, and all its fields."""
    fields = _FRAME.unpack(ctypes.string_at(address, _FRAME.size))
    return fields[1], fields[2], fields[4], fields


def answer_metadata(extension: int) -> bool:
    """Answers XLA's question after a handler's API version; False if the call asks something else."""
    _, kind, _ = _EXTENSION.unpack(ctypes.string_at(extension, _EXTENSION.size))
    if kind != METADATA_EXTENSION:
        return False
    metadata = ctypes.c_uint64.from_address(extension + _EXTENSION.size).value
    (ctypes.c_int * 2).from_address(metadata + _VERSION_OFFSET)[:] = list(API_VERSION)
    ctypes.c_uint32.from_address(metadata + _TRAITS_OFFSET).value = 0
    return True


def create_error(api: int) -> Any:
    """XLA's function from `ErrorArguments` to an error."""
    return _CREATE_ERROR(ctypes.c_uint64.from_address(api + _CREATE_ERROR_OFFSET).value)


def read_call(fields: tuple[int, ...]) -> Call:
    """Reads the operands and results of a frame's fields."""
    _, _, operand_count, _, operands, _, _, result_count, _, results = fields[5:]
    return Call(
        _read_arrays(operands, operand_count),
        _read_arrays(results, result_count),
    )


def _read_arrays(pointers: int, count: int) -> list[Array]:
    found = []
    for pointer in struct.unpack(f"={count}Q", ctypes.string_at(pointers, 8 * count)):
        _, _, dtype, data, rank, dims = _BUFFER.unpack(ctypes.string_at(pointer, _BUFFER.size))
        shape = struct.unpack(f"={rank}q", ctypes.string_at(dims, 8 * rank)) if rank else ()
        name, size = _DTYPES[dtype]
        found.append(Array(data, shape, name, size * math.prod(shape)))
    return found
