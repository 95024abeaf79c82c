"""What the emulator's C++ takes: one dispatch, and what runs it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Protocol

_SLOTS = 31


class Launch(ctypes.Structure):
    """`msl::Launch` of include/emulator/launch.h."""

    _fields_ = (
        ("buffers", ctypes.c_void_p * _SLOTS),
        ("threadgroup_memory", ctypes.c_size_t * _SLOTS),
        ("groups", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("os_threads", ctypes.c_uint),
        ("reverse", ctypes.c_uint),
    )


class Runner(Protocol):
    """Runs one kernel; returns what went wrong, or an empty string."""

    def __call__(self, kernel: str, launch: Launch, buffers: Mapping[int, tuple[int, int]]) -> str: ...
