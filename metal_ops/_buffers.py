"""Host memory as buffers of a GPU that shares it: wrapped in place, or copied.

A mapped file is wrapped once and its planes are bound at offsets. Other memory is wrapped for one submission, in whole
pages, and what lies on a common page becomes one buffer. What is small, or what Metal refuses to wrap, is copied
through a buffer of our own: Apple documents no-copy buffers for mapped memory only, and a copy of some kilobytes costs
less than wrapping them.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from metal_ops._errors import KernelError
from metal_ops._submission import Launch, Memory, Scratch

# Up to this size memory is copied and not wrapped. An estimate until somebody measures it on a Mac.
COPY_BYTES = 256 * 1024
# What the kernels' widest loads need.
_KERNEL_ALIGNMENT = 16
# What copies begin at within the buffer that holds them.
_COPY_ALIGNMENT = 256
_PAGE = mmap.PAGESIZE


class _Region:
    """Memory that stays: a mapped file."""

    def __init__(self, begin: int, nbytes: int) -> None:
        self.begin, self.end = begin, begin + nbytes
        self.buffer: Any = None
        self.refused = False


class Bound:
    """The memory of one submission, as buffers.

    Attributes:
        places: buffer and offset of every piece of memory.
        copies: what is copied, and its address in the device's buffer.
    """

    def __init__(self) -> None:
        self.places: dict[Memory | Scratch, tuple[Any, int]] = {}
        self.copies: list[tuple[Memory, int]] = []

    def copy_in(self) -> int:
        """Copies what kernels read; returns how many bytes."""
        read = [(memory, to) for memory, to in self.copies if not memory.written]
        for memory, to in read:
            ctypes.memmove(to, memory.address, memory.nbytes)
        return sum(memory.nbytes for memory, _ in read)

    def copy_out(self) -> int:
        """Copies what kernels wrote; returns how many bytes."""
        written = [(memory, source) for memory, source in self.copies if memory.written]
        for memory, source in written:
            ctypes.memmove(memory.address, source, memory.nbytes)
        return sum(memory.nbytes for memory, _ in written)


class Buffers:
    """Makes buffers; to be used by one thread at a time.

    Args:
        wrap: from an address and a size, both of whole pages, to a buffer over that memory, or None if there is none.
        copy_bytes: see `COPY_BYTES`.

    Attributes:
        regions: memory that stays, in order of addresses.
    """

    def __init__(self, wrap: Callable[[int, int], Any], copy_bytes: int) -> None:
        self._wrap_pages, self._copy_bytes = wrap, copy_bytes
        self.regions: list[_Region] = []
        self._gone: list[int] = []
        self._staging: tuple[Any, int, mmap.mmap] | None = None

    def keep(self, address: int, nbytes: int, owner: Any) -> None:
        """As `Device.keep`."""
        self._forget_unmapped()
        if nbytes and not any(r.begin <= address < r.end for r in self.regions):
            bisect.insort(self.regions, _Region(address, nbytes), key=lambda r: r.begin)
            # Runs wherever the last reference is dropped, perhaps while this thread is in here.
            weakref.finalize(owner, self._gone.append, address).atexit = False

    def bind(self, launches: Sequence[Launch]) -> Bound:
        """Finds a buffer for all memory of a submission.

        Raises:
            KernelError: if the device gives no buffer for copies.
        """
        self._forget_unmapped()
        bound = Bound()
        large: list[Memory] = []
        copied: list[Memory | Scratch] = []
        for memory in dict.fromkeys(m for launch in launches for m in launch.buffers.values()):
            if isinstance(memory, Scratch) or memory.nbytes == 0 or memory.address % _KERNEL_ALIGNMENT:
                copied.append(memory)
            elif (found := self._in_region(memory)) is not None:
                bound.places[memory] = found
            elif memory.nbytes <= self._copy_bytes:
                copied.append(memory)
            else:
                large.append(memory)
        copied += self._wrap(large, bound)
        if copied:
            self._stage(copied, bound)
        return bound

    def _forget_unmapped(self) -> None:
        while self._gone:
            address = self._gone.pop()
            self.regions = [r for r in self.regions if r.begin != address]

    def _in_region(self, memory: Memory) -> tuple[Any, int] | None:
        at = bisect.bisect_right(self.regions, memory.address, key=lambda r: r.begin) - 1
        region = self.regions[at] if at >= 0 else None
        if region is None or region.refused or memory.address + memory.nbytes > region.end:
            return None
        if region.buffer is None:
            region.buffer = self._wrap_pages(region.begin, _up(region.end) - region.begin)
            region.refused = region.buffer is None
        return None if region.refused else (region.buffer, memory.address - region.begin)

    def _wrap(self, memories: list[Memory], bound: Bound) -> list[Memory]:
        """Wraps memory in whole pages, one buffer where pages are shared; returns what Metal refused."""
        refused: list[Memory] = []
        group: list[Memory] = []
        for memory in [*sorted(memories, key=lambda m: m.address), None]:
            if group and (memory is None or _down(memory.address) >= _up(_end(group))):
                begin = _down(group[0].address)
                buffer = self._wrap_pages(begin, _up(_end(group)) - begin)
                if buffer is None:
                    refused += group
                else:
                    bound.places.update({m: (buffer, m.address - begin) for m in group})
                group = []
            if memory is not None:
                group.append(memory)
        return refused

    def _stage(self, memories: list[Memory | Scratch], bound: Bound) -> None:
        """Gives memory a place in a buffer of our own: one place for what is read and written."""
        offsets: dict[tuple[int, ...], int] = {}
        total = 0
        for memory in memories:
            if memory[:2] not in offsets:
                offsets[memory[:2]] = total
                total += max(memory.nbytes + -memory.nbytes % _COPY_ALIGNMENT, _COPY_ALIGNMENT)
        buffer, address = self._staging_buffer(total)
        for memory in memories:
            at = offsets[memory[:2]]
            bound.places[memory] = buffer, at
            if isinstance(memory, Memory):
                bound.copies.append((memory, address + at))

    def _staging_buffer(self, nbytes: int) -> tuple[Any, int]:
        if self._staging is None or len(self._staging[2]) < nbytes:
            pages = mmap.mmap(-1, _up(max(nbytes, 1 << 20)))
            address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
            buffer = self._wrap_pages(address, len(pages))
            if buffer is None:
                raise KernelError(f"Metal: the device gives no buffer of {len(pages):,} bytes")
            self._staging = buffer, address, pages
        return self._staging[:2]


def _down(address: int) -> int:
    return address - address % _PAGE


def _up(address: int) -> int:
    return address + -address % _PAGE


def _end(memories: list[Memory]) -> int:
    return max(m.address + m.nbytes for m in memories)
