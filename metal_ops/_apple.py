"""An Apple GPU through PyObjC: sources to pipelines, host memory to buffers, launches to command buffers.

CPU and GPU share memory. A mapped file is wrapped as one buffer, once, and its planes are bound at offsets. Other
memory is wrapped for one submission, in whole pages, and what lies on a common page becomes one buffer. What is small,
or what Metal refuses to wrap, is copied through a buffer of our own: Apple documents no-copy buffers for mapped memory
only, and a copy of some kilobytes costs less than wrapping them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from metal_ops._errors import KernelError, UnavailableError
from metal_ops._source import Source

# Up to this size memory is copied and not wrapped. An estimate until somebody measures it on a Mac.
COPY_BYTES = 256 * 1024
# What the kernels' widest loads need.
_KERNEL_ALIGNMENT = 16
# What copies begin at within the buffer that holds them.
_COPY_ALIGNMENT = 256
_PAGE = mmap.PAGESIZE


class Memory(NamedTuple):
    """Host memory that a kernel takes as a buffer.

    Attributes:
        address: where it begins.
        nbytes: its size; may be 0.
        written: whether the kernel writes to it. What it does not write then has no defined content.
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


_Bound: TypeAlias = "dict[Memory | Scratch, tuple[Any, int]]"


class _Region:
    """Memory that stays: a mapped file."""

    def __init__(self, begin: int, nbytes: int) -> None:
        self.begin, self.end = begin, begin + nbytes
        self.buffer: Any = None
        self.refused = False


class Device:
    """A GPU. Safe to use from several threads; one submission runs at a time.

    Args:
        metal: PyObjC's module `Metal`, or something that looks like it.
        autorelease_pool: PyObjC's; XLA's threads have none of their own.
        copy_bytes: see `COPY_BYTES`.
    """

    def __init__(
        self,
        metal: Any,
        autorelease_pool: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        copy_bytes: int = COPY_BYTES,
    ) -> None:
        self._metal, self._pool, self._copy_bytes = metal, autorelease_pool, copy_bytes
        self._lock = threading.Lock()
        self._libraries: dict[str, Any] = {}
        self._pipelines: dict[tuple[str, str], Any] = {}
        self._regions: list[_Region] = []
        self._gone: list[int] = []
        self._resident: dict[bytes, tuple[Memory, mmap.mmap]] = {}
        self._staging: tuple[Any, int, mmap.mmap] | None = None
        self.command_buffers = 0
        with self._pool():
            self._device = metal.MTLCreateSystemDefaultDevice()
            if self._device is None:
                raise UnavailableError(
                    "Metal: this process has no GPU (a virtual machine, or no login session?)"
                )
            self._queue = self._device.newCommandQueue()
            self.name = str(self._device.name())
            self.unified_memory = bool(self._device.hasUnifiedMemory())
            self.limits = Limits(threadgroup_memory=int(self._device.maxThreadgroupMemoryLength()))
            self.max_buffer = int(self._device.maxBufferLength())

    def keep(self, address: int, nbytes: int, owner: Any) -> None:
        """Wraps memory once and for as long as its owner lives, instead of at every submission that uses it.

        Args:
            address: beginning of a page.
            nbytes: size; the last page is the owner's to its end.
            owner: an object that can be weakly referenced and lives as long as the memory, e.g. the `mmap`.
        """
        with self._lock:
            self._forget_unmapped()
            if nbytes and not any(r.begin <= address < r.end for r in self._regions):
                bisect.insort(self._regions, _Region(address, nbytes), key=lambda r: r.begin)
                # Runs wherever the last reference is dropped, perhaps while this thread holds the lock.
                weakref.finalize(owner, self._gone.append, address).atexit = False

    def resident(self, data: bytes) -> Memory:
        """Puts bytes where the device keeps them; the same bytes once."""
        if data not in self._resident:
            pages = mmap.mmap(-1, max(len(data), 1))
            pages[:] = data or bytes(1)
            address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
            self._resident[data] = Memory(address, len(data)), pages
            self.keep(address, len(data), pages)
        return self._resident[data][0]

    def prepare(self, source: Source, kernel: str) -> Any:
        """Compiles a kernel, off the hot path; later launches find it.

        Raises:
            KernelError: with Metal's message, if it does not compile or there is no such kernel.
        """
        with self._lock, self._pool():
            return self._pipeline(source, kernel)

    def run(self, launches: Sequence[Launch]) -> float:
        """Runs launches in order, in one command buffer, and waits for them.

        Returns:
            The seconds that the GPU took.

        Raises:
            KernelError: with Metal's message, if the device reports an error.
        """
        with self._lock, self._pool():
            self._forget_unmapped()
            bound, staged = self._bind(launches)
            for memory, address in staged:
                if not memory.written:
                    ctypes.memmove(address, memory.address, memory.nbytes)
            commands = self._queue.commandBuffer()
            encoder = commands.computeCommandEncoder()
            try:
                for launch in launches:
                    self._encode(encoder, launch, bound)
            finally:
                encoder.endEncoding()
            self.command_buffers += 1
            commands.commit()
            commands.waitUntilCompleted()
            if commands.status() != self._metal.MTLCommandBufferStatusCompleted:
                raise KernelError(f"Metal: {launches[0].kernel}: {_message(commands.error())}")
            for memory, address in staged:
                if memory.written:
                    ctypes.memmove(memory.address, address, memory.nbytes)
            return float(commands.GPUEndTime() - commands.GPUStartTime())

    def _encode(self, encoder: Any, launch: Launch, bound: _Bound) -> None:
        size = self._metal.MTLSizeMake
        encoder.setComputePipelineState_(self._pipeline(launch.source, launch.kernel))
        for index, memory in launch.buffers.items():
            buffer, offset = bound[memory]
            encoder.setBuffer_offset_atIndex_(buffer, offset, index)
        for index, data in launch.constants.items():
            encoder.setBytes_length_atIndex_(data, len(data), index)
        for index, nbytes in launch.threadgroup_memory.items():
            encoder.setThreadgroupMemoryLength_atIndex_(nbytes, index)
        encoder.dispatchThreadgroups_threadsPerThreadgroup_(size(*launch.threadgroups), size(*launch.threads))

    def _pipeline(self, source: Source, kernel: str) -> Any:
        key = source.hash, kernel
        if key not in self._pipelines:
            function = self._library(source).newFunctionWithName_(kernel)
            if function is None:
                raise KernelError(f"Metal: {source.name} has no kernel {kernel!r}")
            pipeline, error = self._device.newComputePipelineStateWithFunction_error_(function, None)
            if pipeline is None:
                raise KernelError(f"Metal: {kernel} does not compile: {_message(error)}")
            if pipeline.threadExecutionWidth() != self.limits.simd_width:
                raise KernelError(
                    f"Metal: {kernel} needs simdgroups of {self.limits.simd_width} lanes; "
                    f"this device has {pipeline.threadExecutionWidth()}"
                )
            self._pipelines[key] = pipeline
        return self._pipelines[key]

    def max_threads(self, source: Source, kernel: str) -> int:
        """Threads that one threadgroup of this kernel may have; fewer than the device's where it needs registers."""
        return int(self.prepare(source, kernel).maxTotalThreadsPerThreadgroup())

    def _library(self, source: Source) -> Any:
        if source.hash not in self._libraries:
            options = self._metal.MTLCompileOptions.alloc().init()
            # macOS 15 brought the first and deprecated the second.
            if hasattr(options, "setMathMode_"):
                options.setMathMode_(self._metal.MTLMathModeSafe)
            else:
                options.setFastMathEnabled_(False)
            library, error = self._device.newLibraryWithSource_options_error_(source.text, options, None)
            # Warnings come as an error beside a library.
            if library is None:
                raise KernelError(f"Metal: {source.name} does not compile: {_message(error)}")
            self._libraries[source.hash] = library
        return self._libraries[source.hash]

    def _bind(self, launches: Sequence[Launch]) -> tuple[_Bound, list[tuple[Memory, int]]]:
        """Finds a buffer and an offset for every piece of memory; also returns what to copy, and where to."""
        bound: _Bound = {}
        large: list[Memory] = []
        copied: list[Memory | Scratch] = []
        for memory in dict.fromkeys(m for launch in launches for m in launch.buffers.values()):
            if isinstance(memory, Scratch):
                copied.append(memory)
            elif (found := self._in_region(memory)) is not None:
                bound[memory] = found
            elif memory.nbytes <= self._copy_bytes or memory.address % _KERNEL_ALIGNMENT:
                copied.append(memory)
            else:
                large.append(memory)
        copied += self._wrap(large, bound)
        return bound, self._stage(copied, bound)

    def _in_region(self, memory: Memory) -> tuple[Any, int] | None:
        at = bisect.bisect_right(self._regions, memory.address, key=lambda r: r.begin) - 1
        region = self._regions[at] if at >= 0 else None
        if region is None or region.refused or memory.address + memory.nbytes > region.end:
            return None
        if region.buffer is None:
            region.buffer = self._no_copy(region.begin, _up(region.end) - region.begin)
            region.refused = region.buffer is None
        return None if region.refused else (region.buffer, memory.address - region.begin)

    def _wrap(self, memories: list[Memory], bound: _Bound) -> list[Memory]:
        """Wraps memory in whole pages, one buffer where pages are shared; returns what Metal refused."""
        refused: list[Memory] = []
        group: list[Memory] = []
        for memory in [*sorted(memories, key=lambda m: m.address), None]:
            if group and (memory is None or _down(memory.address) >= _up(_end(group))):
                begin = _down(group[0].address)
                buffer = self._no_copy(begin, _up(_end(group)) - begin)
                if buffer is None:
                    refused += group
                else:
                    bound.update({m: (buffer, m.address - begin) for m in group})
                group = []
            if memory is not None:
                group.append(memory)
        return refused

    def _no_copy(self, begin: int, nbytes: int) -> Any:
        if nbytes > self.max_buffer:
            return None
        pages = (ctypes.c_char * nbytes).from_address(begin)
        return self._device.newBufferWithBytesNoCopy_length_options_deallocator_(
            pages, nbytes, self._metal.MTLResourceStorageModeShared, None
        )

    def _stage(self, memories: list[Memory | Scratch], bound: _Bound) -> list[tuple[Memory, int]]:
        offsets, total = [], 0
        for memory in memories:
            offsets.append(total)
            total += max(memory.nbytes + -memory.nbytes % _COPY_ALIGNMENT, _COPY_ALIGNMENT)
        if not memories:
            return []
        buffer, address = self._staging_buffer(total)
        bound.update({m: (buffer, at) for m, at in zip(memories, offsets, strict=True)})
        found = zip(memories, offsets, strict=True)
        return [(m, address + at) for m, at in found if isinstance(m, Memory)]

    def _staging_buffer(self, nbytes: int) -> tuple[Any, int]:
        if self._staging is None or len(self._staging[2]) < nbytes:
            pages = mmap.mmap(-1, _up(max(nbytes, 1 << 20)))
            address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
            buffer = self._no_copy(address, len(pages))
            if buffer is None:
                raise KernelError(f"Metal: the device gives no buffer of {len(pages):,} bytes")
            self._staging = buffer, address, pages
        return self._staging[:2]

    def _forget_unmapped(self) -> None:
        while self._gone:
            address = self._gone.pop()
            self._regions = [r for r in self._regions if r.begin != address]


def open_apple_device() -> Device:
    """Opens this machine's GPU.

    Raises:
        UnavailableError: saying what is missing.
    """
    if sys.platform != "darwin":
        raise UnavailableError("Metal: this machine is no Mac")
    try:
        import Metal
        import objc
    except ImportError as error:
        raise UnavailableError('Metal: PyObjC is not installed; pip install "upg-jax[metal]"') from error
    # A process that draws nothing is given the default device only once this is loaded.
    with contextlib.suppress(OSError):
        ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
    device = Device(Metal, objc.autorelease_pool)
    if not device.unified_memory:
        raise UnavailableError(f"Metal: {device.name} does not share memory with the processor")
    return device


def _message(error: Any) -> str:
    return "no message" if error is None else str(error.localizedDescription())


def _down(address: int) -> int:
    return address - address % _PAGE


def _up(address: int) -> int:
    return address + -address % _PAGE


def _end(memories: list[Memory]) -> int:
    return max(m.address + m.nbytes for m in memories)
