"""A stand-in for PyObjC's `Metal` on machines without Metal.

It has the methods that PyObjC publishes and no others, checks the arguments' types and Metal's rules at every call, and
runs kernels in the emulator. So all code between a kernel and `import Metal` runs, and can be wrong, on Linux.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

from metal_ops._standin._commands import Buffer, Error, Queue
from metal_ops._standin._rules import MetalObject, address_of, require, size_make
from metal_ops._standin._selectors import CONSTANTS

_SIMD_WIDTH = 32


class StandIn:
    """What `import Metal` gives, as far as this package uses it.

    Args:
        compile: from source text to a program of the emulator; raises for text that is no MSL.
        no_copy: False refuses every no-copy buffer, as a device may.
        math_mode: False lacks the method that macOS 15 brought.
        max_buffer_length: of one buffer.
        max_threads: of one threadgroup of any kernel.
        unified_memory: whether CPU and GPU share memory.
    """

    def __init__(
        self,
        compile: Callable[[str], Any],
        *,
        no_copy: bool = True,
        math_mode: bool = True,
        max_buffer_length: int = 1 << 40,
        max_threads: int = 1024,
        unified_memory: bool = True,
    ) -> None:
        self._compile = compile
        self._no_copy = no_copy
        self._max_buffer_length = max_buffer_length
        self._max_threads, self._unified_memory = max_threads, unified_memory
        self._pools = threading.local()
        options = ModernCompileOptions if math_mode else CompileOptions
        self.MTLCompileOptions = _Class(options)
        self.MTLSizeMake = size_make

    def __getattr__(self, name: str) -> int:
        if name in CONSTANTS:
            return CONSTANTS[name]
        raise AttributeError(f"PyObjC's Metal, or the part of it in use, has no {name!r}")

    def MTLCreateSystemDefaultDevice(self) -> Device:  # noqa: N802
        """Makes the device."""
        return Device(self)

    @contextlib.contextmanager
    def autorelease_pool(self) -> Iterator[None]:
        """`objc.autorelease_pool`."""
        self._pools.depth = getattr(self._pools, "depth", 0) + 1
        try:
            yield
        finally:
            self._pools.depth -= 1

    def _require_pool(self, what: str) -> None:
        require(getattr(self._pools, "depth", 0) > 0, f"{what}: this thread has no autorelease pool")


class _Class:
    """An Objective-C class: `alloc().init()`."""

    def __init__(self, made: type) -> None:
        self._made = made

    def alloc(self) -> _Class:
        return self

    def init(self) -> Any:
        return self._made()


class CompileOptions(MetalObject):
    """`MTLCompileOptions` before macOS 15."""

    def __init__(self) -> None:
        self._safe = False

    def setFastMathEnabled_(self, enabled: bool) -> None:  # noqa: N802
        """Allows the compiler to break IEEE's rules."""
        self._safe = not enabled


class ModernCompileOptions(CompileOptions):
    """`MTLCompileOptions` since macOS 15."""

    def setMathMode_(self, mode: int) -> None:  # noqa: N802
        """Which of IEEE's rules the compiler may break."""
        self._safe = mode == CONSTANTS["MTLMathModeSafe"]


class Device(MetalObject):
    """`MTLDevice`."""

    def __init__(self, metal: StandIn) -> None:
        self._metal = metal

    def name(self) -> str:
        """What the device is called."""
        return "emulator"

    def hasUnifiedMemory(self) -> bool:  # noqa: N802
        """Whether CPU and GPU share memory."""
        return self._metal._unified_memory

    def maxBufferLength(self) -> int:  # noqa: N802
        """Largest buffer in bytes."""
        return self._metal._max_buffer_length

    def maxThreadgroupMemoryLength(self) -> int:  # noqa: N802
        """Bytes of threadgroup memory."""
        return 32 * 1024

    def newCommandQueue(self) -> Queue:  # noqa: N802
        """Makes a queue."""
        return Queue(self._metal)

    def newLibraryWithSource_options_error_(self, text: str, options: Any, error: None) -> Any:  # noqa: N802
        """Compiles a source."""
        require(
            isinstance(options, CompileOptions), "newLibraryWithSource: options must be MTLCompileOptions"
        )
        require(options._safe, "newLibraryWithSource: ask for IEEE-safe math")
        try:
            return Library(self._metal, self._metal._compile(text)), None
        except Exception as failure:
            return None, Error(str(failure))

    def newComputePipelineStateWithFunction_error_(self, function: Any, error: None) -> Any:  # noqa: N802
        """Makes a kernel ready to launch."""
        require(isinstance(function, Function), f"newComputePipelineState: not a function: {function!r}")
        return Pipeline(function), None

    def newBufferWithBytesNoCopy_length_options_deallocator_(  # noqa: N802
        self, memory: Any, length: int, options: int, deallocator: None
    ) -> Buffer | None:
        """Wraps whole pages of memory."""
        require(options == CONSTANTS["MTLResourceStorageModeShared"], "newBuffer: no-copy memory is shared")
        require(deallocator is None, "newBuffer: the memory is not Metal's to free")
        address = address_of(memory)
        require(length == memoryview(memory).nbytes, "newBuffer: the length must be the memory's")
        require(
            length > 0 and address % mmap.PAGESIZE == 0 and length % mmap.PAGESIZE == 0,
            f"newBuffer: must be whole pages; got {length} bytes at {address:#x}",
        )
        if not self._metal._no_copy or length > self._metal._max_buffer_length:
            return None
        return Buffer(address, length, memory)


class Library(MetalObject):
    """`MTLLibrary`."""

    def __init__(self, metal: StandIn, program: Any) -> None:
        self._metal, self._program = metal, program

    def newFunctionWithName_(self, name: str) -> Function | None:  # noqa: N802
        """Finds a kernel by its host name."""
        return Function(self._metal, self._program, name) if name in self._program.signatures else None


class Function(MetalObject):
    """`MTLFunction`."""

    def __init__(self, metal: StandIn, program: Any, name: str) -> None:
        self._metal, self._program, self._kernel = metal, program, name


class Pipeline(MetalObject):
    """`MTLComputePipelineState`."""

    def __init__(self, function: Function) -> None:
        self._metal, self._program, self._kernel = function._metal, function._program, function._kernel
        signature = self._program.signatures[self._kernel]
        self._arguments = list(signature.buffers()), list(signature.threadgroup_memory())

    def threadExecutionWidth(self) -> int:  # noqa: N802
        """Lanes of a simdgroup."""
        return _SIMD_WIDTH

    def maxTotalThreadsPerThreadgroup(self) -> int:  # noqa: N802
        """Largest threadgroup of this kernel."""
        return self._metal._max_threads
