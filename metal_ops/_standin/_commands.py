"""Command buffers and encoders: they collect launches, which run when the host waits for them."""

from __future__ import annotations

import ctypes
import itertools
import time
from typing import Any

from metal_ops._standin._rules import MetalObject, MTLSize, require
from metal_ops._standin._selectors import CONSTANTS

_MAX_BUFFERS = 31
_MAX_INLINE_BYTES = 4096
_THREADGROUP_MEMORY = 32 * 1024


class Error:
    """`NSError`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def localizedDescription(self) -> str:  # noqa: N802
        """The message."""
        return self._text


class Buffer(MetalObject):
    """`MTLBuffer`, over memory that it does not own."""

    def __init__(self, address: int, nbytes: int, memory: Any) -> None:
        self._address, self._nbytes, self._memory = address, nbytes, memory


class Queue(MetalObject):
    """`MTLCommandQueue`."""

    def __init__(self, metal: Any) -> None:
        self._metal = metal

    def commandBuffer(self) -> CommandBuffer:  # noqa: N802
        """Makes a command buffer; autoreleased, so a pool must be there to take it."""
        self._metal._require_pool("commandBuffer")
        return CommandBuffer(self._metal)


class CommandBuffer(MetalObject):
    """`MTLCommandBuffer`: nothing runs before it is waited for, so that whoever forgets to wait sees old memory."""

    def __init__(self, metal: Any) -> None:
        self._metal = metal
        self._encoders: list[Encoder] = []
        self._status = 0
        self._failure: Error | None = None
        self._times = (0.0, 0.0)

    def computeCommandEncoder(self) -> Encoder:  # noqa: N802
        """Begins a pass; one at a time."""
        self._metal._require_pool("computeCommandEncoder")
        require(self._status == 0, "computeCommandEncoder: the command buffer is committed")
        require(all(e._ended for e in self._encoders), "computeCommandEncoder: end the encoder before")
        self._encoders.append(Encoder())
        return self._encoders[-1]

    def commit(self) -> None:
        """Hands the work to the device."""
        require(self._status == 0, "commit: a command buffer is committed once")
        require(all(e._ended for e in self._encoders), "commit: every encoder must have ended")
        self._status = 2

    def waitUntilCompleted(self) -> None:  # noqa: N802
        """Runs the work."""
        require(self._status >= 2, "waitUntilCompleted: commit before")
        if self._status != 2:
            return
        begin = time.perf_counter()
        try:
            for encoder in self._encoders:
                for run in encoder._launches:
                    run()
        except Exception as error:
            # As on a device: what goes wrong in a kernel is told by the command buffer.
            self._status, self._failure = CONSTANTS["MTLCommandBufferStatusError"], Error(str(error))
        else:
            self._status = CONSTANTS["MTLCommandBufferStatusCompleted"]
        self._times = begin, time.perf_counter()

    def status(self) -> int:
        """`MTLCommandBufferStatus`."""
        return self._status

    def error(self) -> Error | None:
        """What went wrong."""
        return self._failure

    def GPUStartTime(self) -> float:  # noqa: N802
        """When the work began, in seconds."""
        return self._times[0]

    def GPUEndTime(self) -> float:  # noqa: N802
        """When it ended."""
        return self._times[1]


class Encoder(MetalObject):
    """`MTLComputeCommandEncoder`; what is set stays set for the next dispatch."""

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._buffers: dict[int, tuple[Buffer, int]] = {}
        self._threadgroup: dict[int, int] = {}
        self._launches: list[Any] = []
        self._ended = False

    def setComputePipelineState_(self, pipeline: Any) -> None:  # noqa: N802
        """Chooses the kernel."""
        require(not self._ended, "setComputePipelineState: the encoder has ended")
        require(hasattr(pipeline, "_program"), f"setComputePipelineState: not a pipeline: {pipeline!r}")
        self._pipeline = pipeline

    def setBuffer_offset_atIndex_(self, buffer: Buffer, offset: int, index: int) -> None:  # noqa: N802
        """Binds a buffer."""
        require(not self._ended, "setBuffer: the encoder has ended")
        require(index < _MAX_BUFFERS, f"setBuffer: index must be below {_MAX_BUFFERS}; got {index}")
        require(isinstance(buffer, Buffer), f"setBuffer: not a buffer: {buffer!r}")
        require(offset < buffer._nbytes, f"setBuffer: offset {offset} is outside of {buffer._nbytes} bytes")
        self._buffers[index] = buffer, offset

    def setBytes_length_atIndex_(self, data: Any, length: int, index: int) -> None:  # noqa: N802
        """Copies a few bytes."""
        require(not self._ended, "setBytes: the encoder has ended")
        require(index < _MAX_BUFFERS, f"setBytes: index must be below {_MAX_BUFFERS}; got {index}")
        content = bytes(memoryview(data).cast("B"))
        require(0 < length <= _MAX_INLINE_BYTES, f"setBytes: 1 to {_MAX_INLINE_BYTES} bytes; got {length}")
        require(
            length == len(content), f"setBytes: length is {length}, and the data has {len(content)} bytes"
        )
        copy = ctypes.create_string_buffer(content, length)
        self._buffers[index] = Buffer(ctypes.addressof(copy), length, copy), 0

    def setThreadgroupMemoryLength_atIndex_(self, length: int, index: int) -> None:  # noqa: N802
        """Sizes a threadgroup argument."""
        require(not self._ended, "setThreadgroupMemoryLength: the encoder has ended")
        require(length % 16 == 0, f"setThreadgroupMemoryLength: must be a multiple of 16; got {length}")
        self._threadgroup[index] = length

    def dispatchThreadgroups_threadsPerThreadgroup_(self, groups: MTLSize, threads: MTLSize) -> None:  # noqa: N802
        """Encodes a launch."""
        require(not self._ended, "dispatch: the encoder has ended")
        require(self._pipeline is not None, "dispatch: set a pipeline before")
        pipeline = self._pipeline
        limit = pipeline.maxTotalThreadsPerThreadgroup()
        require(0 < threads.total <= limit, f"dispatch: 1 to {limit} threads in a threadgroup; got {threads}")
        require(groups.total > 0, f"dispatch: must have threadgroups; got {groups}")
        used = sum(self._threadgroup.values())
        require(used <= _THREADGROUP_MEMORY, f"dispatch: {used} bytes of threadgroup memory; at most 32 KiB")
        indices, threadgroup_indices = pipeline._arguments
        for index in indices:
            require(index in self._buffers, f"dispatch: buffer({index}) of {pipeline._kernel} is not set")
        for index in threadgroup_indices:
            require(
                self._threadgroup.get(index, 0) > 0,
                f"dispatch: the length of threadgroup({index}) of {pipeline._kernel} is not set",
            )
        bound = {i: self._buffers[i] for i in indices}
        _require_own_pages([buffer for buffer, _ in bound.values()])
        arguments = {i: (b._address + offset, b._nbytes - offset) for i, (b, offset) in bound.items()}
        threadgroup = {i: self._threadgroup[i] for i in threadgroup_indices}
        self._launches.append(
            # `bound` keeps the buffers alive, as a command buffer does.
            lambda: (
                pipeline._program.dispatch(
                    pipeline._kernel,
                    arguments,
                    threadgroups=tuple(groups),
                    threads_per_threadgroup=tuple(threads),
                    threadgroup_memory=threadgroup,
                ),
                bound,
            )
        )

    def endEncoding(self) -> None:  # noqa: N802
        """Ends the pass."""
        require(not self._ended, "endEncoding: the encoder has ended")
        self._ended = True


def _require_own_pages(buffers: list[Buffer]) -> None:
    """Whether two buffers over the same memory in one dispatch work is not documented, so nobody may rely on it."""
    ranges = sorted({(b._address, b._address + b._nbytes) for b in buffers})
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        require(end <= begin, "dispatch: two buffers share memory; bind one of them at two offsets")
