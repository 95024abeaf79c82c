"""A device over the stand-in that notes what it is asked for, and a kernel for it."""

from __future__ import annotations

import mmap

import numpy as np

import metal_ops
from metal_ops import Launch, Memory
from metal_ops._standin import StandIn
from metal_ops._standin._open import _compile

TEXT = """#include <metal_stdlib>
using namespace metal;
kernel void add(device const float* x [[buffer(0)]], device const float* z [[buffer(1)]], device float* y [[buffer(2)]],
                constant uint& n [[buffer(3)]], uint i [[thread_position_in_grid]]) {
    if (i < n) y[i] = x[i] + z[i];
}
kernel void divergent(device float* y [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {
    if (lane < 16) y[lane] = simd_sum(1.0f);
}
"""
PAGE = mmap.PAGESIZE


class Watched(StandIn):
    """Notes the sizes of the buffers that are asked for, and refuses some."""

    def __init__(self, **behaviour):
        super().__init__(_compile, **behaviour)
        self._sizes, self._refused = [], set()
        self._compiled = []
        inner = self._compile
        self._compile = lambda text: (self._compiled.append(text), inner(text))[1]

    def MTLCreateSystemDefaultDevice(self):  # noqa: N802
        device = super().MTLCreateSystemDefaultDevice()
        make = device.newBufferWithBytesNoCopy_length_options_deallocator_

        class Watching:
            def __getattr__(self, name):
                return getattr(device, name)

            def newBufferWithBytesNoCopy_length_options_deallocator_(_, memory, length, options, free):  # noqa: N802, N805
                self._sizes.append(length)
                if length in self._refused:
                    return None
                return make(memory, length, options, free)

        return Watching()


def watched(copy_bytes=0, **behaviour):
    metal = Watched(**behaviour)
    return metal_ops.Device(metal, metal.autorelease_pool, copy_bytes=copy_bytes), metal


def memory(array, written=False):
    return Memory(array.ctypes.data, array.nbytes, written)


def add(source, x, z, y, count=None):
    count = x.size if count is None else count
    buffers = {0: memory(x), 1: memory(z), 2: memory(y, written=True)}
    constants = {3: np.uint32(count).tobytes()}
    return Launch(source, "add", buffers, constants, (-(-max(count, 1) // 32), 1, 1), (32, 1, 1))


def pages(count):
    """Memory of its own, as a mapped file has."""
    owner = mmap.mmap(-1, count * PAGE)
    return owner, np.frombuffer(owner, np.float32)
