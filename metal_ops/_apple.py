"""An Apple GPU through PyObjC: sources to pipelines, launches to command buffers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from metal_ops._buffers import COPY_BYTES, Bound, Buffers
from metal_ops._errors import KernelError, UnavailableError
from metal_ops._plans import Plan, Work, plan
from metal_ops._source import Source
from metal_ops._submission import Launch, Limits, Memory


class Device:
    """A GPU. Safe to use from several threads; one submission runs at a time.

    Args:
        metal: PyObjC's module `Metal`, or something that looks like it.
        autorelease_pool: PyObjC's; XLA's threads have none of their own.
        copy_bytes: up to which size memory is copied and not wrapped.

    Attributes:
        name: the GPU's.
        limits: what launches must keep to.
        unified_memory: whether it shares memory with the processor.
        max_buffer: bytes of one buffer.
        command_buffers: submissions so far.
        copied_bytes: what was copied to and from it so far, because it was small or could not be wrapped.
    """

    def __init__(
        self,
        metal: Any,
        autorelease_pool: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        copy_bytes: int = COPY_BYTES,
    ) -> None:
        self._metal, self._pool = metal, autorelease_pool
        self._lock = threading.Lock()
        self._libraries: dict[str, Any] = {}
        self._pipelines: dict[tuple[str, str], Any] = {}
        self._plans: dict[tuple[Work, str | None], Plan] = {}
        self._resident: dict[bytes, tuple[Memory, mmap.mmap]] = {}
        self._buffers = Buffers(self._wrap, copy_bytes)
        self.command_buffers = self.copied_bytes = 0
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
            self._buffers.keep(address, nbytes, owner)

    def resident(self, data: bytes) -> Memory:
        """Puts bytes where the device keeps them; the same bytes once."""
        with self._lock:
            if data not in self._resident:
                pages = mmap.mmap(-1, max(len(data), 1))
                pages[:] = data or bytes(1)
                address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
                self._resident[data] = Memory(address, len(data)), pages
                self._buffers.keep(address, len(data), pages)
            return self._resident[data][0]

    def prepare(self, source: Source, kernel: str) -> Any:
        """Compiles a kernel, off the hot path; later launches find it.

        Raises:
            KernelError: with Metal's message, if it does not compile or there is no such kernel.
        """
        with self._lock, self._pool():
            return self._pipeline(source, kernel)

    def plan(self, work: Work, variant: str | None = None) -> Plan:
        """`metal_ops.plan` for this device, whose compiler may allow a kernel fewer threads; compiles the kernels.

        Raises:
            KernelError: as `prepare`.
        """
        key = work, variant
        if key not in self._plans:
            found = plan(work, self.limits, variant)
            threads = [self.max_threads(step.source, step.kernel) for step in found.steps]
            if any(step.threads[0] > most for step, most in zip(found.steps, threads, strict=True)):
                found = plan(work, dataclasses.replace(self.limits, threads=min(threads)), variant)
            self._plans[key] = found
        return self._plans[key]

    def run(self, launches: Sequence[Launch]) -> float:
        """Runs launches in order, in one command buffer, and waits for them.

        Returns:
            The seconds that the GPU took.

        Raises:
            KernelError: with Metal's message, if the device reports an error.
        """
        with self._lock, self._pool():
            bound = self._buffers.bind(launches)
            self.copied_bytes += bound.copy_in()
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
            self.copied_bytes += bound.copy_out()
            return float(commands.GPUEndTime() - commands.GPUStartTime())

    def _encode(self, encoder: Any, launch: Launch, bound: Bound) -> None:
        size = self._metal.MTLSizeMake
        encoder.setComputePipelineState_(self._pipeline(launch.source, launch.kernel))
        for index, memory in launch.buffers.items():
            buffer, offset = bound.places[memory]
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

    def _wrap(self, begin: int, nbytes: int) -> Any:
        """A buffer over whole pages, or None."""
        if nbytes > self.max_buffer:
            return None
        pages = (ctypes.c_char * nbytes).from_address(begin)
        return self._device.newBufferWithBytesNoCopy_length_options_deallocator_(
            pages, nbytes, self._metal.MTLResourceStorageModeShared, None
        )


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
