"""What a device is given: memory, launches over it, and the limits that launches keep to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from metal_ops._source import Source


class Memory(NamedTuple):
    """Host memory that a kernel takes as a buffer.

    Launches of one submission may write to memory and read it again if they name the same address and size. Memory that
    is written must not overlap other memory of the submission.

    Attributes:
        address: where it begins.
        nbytes: its size; may be 0.
        written: whether the kernel writes to it. What nobody writes or reads then has no defined content.
    """

    address: int
    nbytes: int
    written: bool = False


class Scratch(NamedTuple):
    """Device memory that is handed from one launch to a later one of the same submission.

    Attributes:
        nbytes: its size. All scratch memory of a submission that has one size is the same memory.
    """

    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One dispatch of a kernel.

    Attributes:
        source: of the kernel.
        kernel: host name.
        buffers: memory by buffer index.
        constants: bytes by buffer index, at most 4096 each.
        threadgroups: of the grid, each at least 1.
        threads: of a threadgroup.
        threadgroup_memory: bytes by index, multiples of 16.
    """

    source: Source
    kernel: str
    buffers: Mapping[int, Memory | Scratch]
    constants: Mapping[int, bytes]
    threadgroups: tuple[int, int, int]
    threads: tuple[int, int, int]
    threadgroup_memory: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device can do.

    Attributes:
        threads: of a threadgroup.
        threadgroup_memory: bytes.
        simd_width: lanes of a simdgroup.
    """

    threads: int = 1024
    threadgroup_memory: int = 32 * 1024
    simd_width: int = 32
