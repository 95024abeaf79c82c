"""How fast are the kernels, as a share of the speed at which the GPU reads memory, and what is read in place?"""

from __future__ import annotations

import math
import mmap
import tempfile
import time
from collections.abc import Iterator, Set

import numpy as np

from metal_ops import PRODUCT_KERNELS, Device, Launch, Memory, Source
from upg_jax._metal_report._layer import DECODE, MANIFOLDS, TRANSPOSED, Layer, keep, memory_of
from upg_jax._metal_report._line import Line, attempt

_SHAPES = ((7680, 5120), (5120, 5120), (35_840, 5120), (5120, 17_920))
_EMULATED_SHAPES = ((64, 256),)
_DENSITIES = (0.1, 0.5)
_REPEATS = 20
# More than the caches of Apple's GPUs hold.
_BEYOND_CACHES = 256 << 20
_LARGEST_DENSE = 256 << 20
_VECTORS = {"sparse_matvec_batch": 8}

_READ = """#include <metal_stdlib>
using namespace metal;
kernel void read_all(device const uint4* from [[buffer(0)]], device uint* to [[buffer(1)]],
                     constant uint& count [[buffer(2)]], uint i [[thread_position_in_grid]],
                     uint n [[threads_per_grid]]) {
    uint sum = 0;
    for (uint k = i; k < count; k += n) {
        uint4 four = from[k];
        sum += four.x + four.y + four.z + four.w;
    }
    to[i] = sum;
}
"""


def memory(device: Device) -> Iterator[Line]:
    """Whether a mapped file and an array of JAX reach the GPU in place; copies work, but slowly."""
    numbers = np.arange(1 << 20, dtype=np.uint32)

    def in_place(where: Memory) -> str:
        before = device.copied_bytes
        _read(device, where, numbers)
        if device.copied_bytes - before >= where.nbytes:
            raise AssertionError("right, but copied for every launch: Metal gives no buffer over this memory")
        return "read in place"

    def mapped() -> str:
        with tempfile.TemporaryFile() as file:
            file.write(numbers.tobytes())
            file.flush()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = np.frombuffer(pages, np.uint32)
        device.keep(view.ctypes.data, view.nbytes, pages)
        return in_place(memory_of(view))

    def of_jax() -> str:
        import jax.numpy as jnp

        array = jnp.asarray(numbers).block_until_ready()
        return in_place(Memory(array.unsafe_buffer_pointer(), array.nbytes))

    yield attempt("memory", "a read-only mapped file", mapped)
    yield attempt("memory", "an array of JAX", of_jax)


def timing(device: Device, compiled: Set[str], emulated: bool) -> Iterator[Line]:
    """The kernels on the shapes of a large model, reading planes that no cache holds."""
    tiny = Layer(device, (32, 64), 0.5, "unit")
    beyond = 0 if emulated else _BEYOND_CACHES

    def wait() -> str:
        gpu, wall = _timed(device, tiny, "sparse_matvec_simd")
        return f"{wall * 1e6:.0f} us from call to result, {gpu * 1e6:.0f} us of it on the GPU"

    yield attempt("fast", "smallest product, one wait", wait)
    bandwidth = 0.0

    def read() -> str:
        nonlocal bandwidth
        numbers = np.arange(max(beyond, 1 << 20) // 4, dtype=np.uint32)
        where, _pages = keep(device, numbers)
        seconds = float(np.median([_read(device, where, numbers) for _ in range(_REPEATS)]))
        bandwidth = numbers.nbytes / seconds
        return f"{bandwidth / 1e9:.1f} GB/s"

    yield attempt("fast", "reading memory", read)
    kernels = [name for name in (*PRODUCT_KERNELS, TRANSPOSED, DECODE) if name in compiled]
    for shape in _EMULATED_SHAPES if emulated else _SHAPES:
        for density in _DENSITIES:
            for manifold in MANIFOLDS:
                layer = Layer(device, shape, density, manifold, beyond)
                for kernel in kernels:
                    if kernel != DECODE or 4 * math.prod(shape) <= _LARGEST_DENSE:
                        yield _time(device, layer, density, kernel, bandwidth)


def _time(device: Device, layer: Layer, density: float, kernel: str, bandwidth: float) -> Line:
    def work() -> str:
        gpu, wall = _timed(device, layer, kernel)
        moved = layer.nbytes + (4 * math.prod(layer.shape) if kernel == DECODE else 0)
        share = moved / gpu / bandwidth if bandwidth else math.nan
        return f"{gpu * 1e6:.0f} us on the GPU, {wall * 1e6:.0f} us in all, {share:.0%} of the memory's speed"

    rows, columns = layer.shape
    vectors = f" x {_VECTORS[kernel]}" if kernel in _VECTORS else ""
    return attempt("fast", f"{rows}x{columns} at {density} {layer.manifold}, {kernel}{vectors}", work)


def _timed(device: Device, layer: Layer, kernel: str) -> tuple[float, float]:
    """Median seconds on the GPU and on the clock."""
    vectors = _VECTORS.get(kernel, 1)
    x, y = layer.arrays(kernel, vectors, "float32")
    plan = layer.plan(device, kernel, vectors, "float32")
    gpu, wall = [], []
    for i in range(_REPEATS):
        begin = time.perf_counter()
        gpu.append(layer.run(device, plan, x, y, copy=i))
        wall.append(time.perf_counter() - begin)
    return float(np.median(gpu)), float(np.median(wall))


def _read(device: Device, where: Memory, numbers: np.ndarray) -> float:
    """The GPU's seconds for reading memory that holds some numbers, whose sum is checked."""
    source = Source("read_all", _READ, tuple(("read_all", i + 1) for i in range(_READ.count("\n") + 1)), {})
    threads, groups = 256, min(1024, where.nbytes // 4096)
    sums = np.empty(threads * groups, np.uint32)
    buffers = {0: where, 1: Memory(sums.ctypes.data, sums.nbytes, written=True)}
    constants = {2: np.uint32(where.nbytes // 16).tobytes()}
    seconds = device.run([Launch(source, "read_all", buffers, constants, (groups, 1, 1), (threads, 1, 1))])
    if sums.sum(dtype=np.uint32) != numbers.sum(dtype=np.uint32):
        raise AssertionError("the sum of what was read is wrong")
    return seconds
