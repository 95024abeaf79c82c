"""What `upg-jax doctor --metal` finds out: do the kernels compile, are they right, how fast are they.

On a Mac with its GPU, elsewhere in the emulator, whose times mean nothing. An error in one line does not keep the
others from being tried.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import mmap
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

import metal_ops
from metal_ops import PRODUCT_KERNELS, Device, Launch, Memory, Source, Work
from upg_jax._mdcsr import MdCSR

_SOURCES = (*PRODUCT_KERNELS, "dense_sparse", "mdcsr_decode")
_MANIFOLDS = ("unit", "prime")
_DTYPES = ("float32", "float16", "bfloat16")
_EPS = 2.0**-24

_CHECKED_SHAPE = (67, 1031)
_TIMED_SHAPES = ((7680, 5120), (5120, 5120), (35_840, 5120), (5120, 17_920))
_EMULATED_SHAPES = ((64, 256),)
_DENSITIES = (0.1, 0.5)
# Rows that are encoded; the others repeat them.
_DISTINCT_ROWS = 256
_REPEATS = 20

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


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        section: what it belongs to.
        name: what was tried.
        ok: whether it worked.
        found: the result, or the error.
    """

    section: str
    name: str
    ok: bool
    found: str


def report() -> Iterator[Line]:
    """Yields the lines of the report as they come."""
    emulated = sys.platform != "darwin"
    yield from _about(emulated)
    try:
        device = metal_ops.open_emulated_device() if emulated else metal_ops.open_apple_device()
    except metal_ops.MetalError as error:
        yield Line("device", "opening", False, str(error))
        return
    limits = device.limits
    yield Line("device", "name", True, device.name)
    yield Line("device", "threadgroup memory", True, f"{limits.threadgroup_memory:,} bytes")
    yield Line("device", "largest buffer", True, f"{device.max_buffer:,} bytes")
    compiled = True
    for line in _compile(device):
        compiled &= line.ok
        yield line
    if not compiled:
        return
    yield _try("right", "self-check", lambda: _self_check(device))
    yield from _check(device)
    yield from _inside_jit("emulator" if emulated else "metal")
    yield from _time(device, _EMULATED_SHAPES if emulated else _TIMED_SHAPES)


def _about(emulated: bool) -> Iterator[Line]:
    from upg_jax._version import __version__

    packages = ("jax", "jaxlib", "numpy", "pyobjc-core", "pyobjc-framework-Metal")
    yield Line(
        "machine", "runs on", True, "the emulator (no Mac): times mean nothing" if emulated else "Metal"
    )
    yield Line("machine", "system", True, f"{platform.platform()}, macOS {platform.mac_ver()[0] or 'none'}")
    yield Line("machine", "page size", True, f"{mmap.PAGESIZE:,} bytes")
    yield Line("machine", "python", True, platform.python_version())
    yield Line("machine", "upg_jax", True, __version__)
    for name in packages:
        try:
            yield Line("machine", name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Line("machine", name, emulated or not name.startswith("pyobjc"), "not installed")


def _self_check(device: Device) -> str:
    metal_ops.check_device(device)
    return "exact"


def _try(section: str, name: str, work: Callable[[], str]) -> Line:
    try:
        return Line(section, name, True, work())
    except Exception as error:
        return Line(section, name, False, f"{type(error).__name__}: {error}")


def _compile(device: Device) -> Iterator[Line]:
    for name in _SOURCES:

        def compile_all(name: str = name) -> str:
            source = metal_ops.load_source(name)
            begin = time.perf_counter()
            kernels = list(metal_ops.translate(source).signatures)
            threads = [device.max_threads(source, kernel) for kernel in kernels]
            seconds = time.perf_counter() - begin
            return f"{len(kernels)} kernels in {seconds:.1f} s, threadgroups up to {min(threads)} threads"

        yield _try("compiles", name, compile_all)


class _Layer:
    """Planes in pages of their own, which the device keeps, as it does a mapped file."""

    def __init__(self, device: Device, shape: tuple[int, int], density: float, manifold: str) -> None:
        rng = np.random.default_rng(0)
        rows, columns = shape
        distinct = min(rows, _DISTINCT_ROWS)
        w = rng.standard_normal((distinct, columns)).astype(np.float32)
        w[:: max(distinct // 3, 1)] *= rng.random(columns) < 0.02  # long gaps, and short rows
        encoded = MdCSR.from_dense(w, density=density, manifold=manifold)  # type: ignore[arg-type]
        times = math.ceil(rows / distinct)
        pointers = np.asarray(encoded.row_pointers).astype(np.int64)
        used = int(pointers[-1])
        lengths = np.tile(np.diff(pointers), times)[:rows]
        planes = {
            "values": np.tile(np.asarray(encoded.values)[:used], times),
            "deltas": np.tile(np.asarray(encoded.delta_indices)[:used], times),
            "row_pointers": np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32),
            "scales": np.tile(np.asarray(encoded.scales), times)[:rows],
        }
        if encoded.prime_indices is not None:
            planes["prime_indices"] = np.tile(np.asarray(encoded.prime_indices)[:used], times)
            planes["prime_table"] = metal_ops.prime_table()
        self.shape, self.manifold, self.capacity = shape, manifold, used * times
        self.nbytes = sum(plane.nbytes for name, plane in planes.items() if name != "prime_table")
        self.weight = np.asarray(encoded.to_dense("float32")) if rows == distinct else None
        kept = {name: _kept(device, plane) for name, plane in planes.items()}
        self.memory = {name: memory for name, (memory, _) in kept.items()}
        self._pages = [pages for _, pages in kept.values()]

    def work(self, operation: Any, vectors: int, dtype: str) -> Work:
        return Work(operation, *self.shape, self.capacity, 1, 1, vectors, self.manifold, dtype)  # type: ignore[arg-type]

    def run(self, device: Device, plan: metal_ops.Plan, x: np.ndarray, y: np.ndarray) -> float:
        index = np.zeros(1, np.int32)
        given = {"x": _memory(x), "index": _memory(index), "y": Memory(y.ctypes.data, y.nbytes, written=True)}
        return device.run(plan.launches({**self.memory, **given}))


def _memory(array: np.ndarray) -> Memory:
    return Memory(array.ctypes.data, array.nbytes)


def _kept(device: Device, plane: np.ndarray) -> tuple[Memory, mmap.mmap]:
    """A copy in pages that live as long as the second result."""
    pages = mmap.mmap(-1, max(plane.nbytes, 1))
    view = np.frombuffer(pages, np.uint8)[: plane.nbytes]
    view[:] = plane.view(np.uint8).reshape(-1)
    device.keep(view.ctypes.data, plane.nbytes, pages)
    return _memory(view), pages


def _check(device: Device) -> Iterator[Line]:
    for manifold in _MANIFOLDS:
        layer = _Layer(device, _CHECKED_SHAPE, 0.3, manifold)
        for kernel in PRODUCT_KERNELS:
            for dtype in _DTYPES:
                yield _check_product(device, layer, "product", dtype, kernel)
        for dtype in _DTYPES:
            yield _check_product(device, layer, "transposed", dtype, None)

        def decode(layer: _Layer = layer) -> str:
            y = np.full((1, *layer.shape), np.nan, np.float32)
            found = metal_ops.plan(layer.work("decode", 1, "float32"), device.limits)
            layer.run(device, found, np.zeros(4, np.float32), y)
            if not np.array_equal(y[0], layer.weight):  # type: ignore[arg-type]
                raise AssertionError(f"{np.count_nonzero(y[0] != layer.weight)} weights differ")
            return "exact"

        yield _try("right", f"mdcsr_decode {manifold}", decode)


def _check_product(device: Device, layer: _Layer, operation: str, dtype: str, kernel: str | None) -> Line:
    def check() -> str:
        rows, columns = layer.shape
        w = np.asarray(layer.weight, np.float64)
        matrix = w.T if operation == "product" else w
        x = np.random.default_rng(1).standard_normal((3, matrix.shape[0])).astype(_element(dtype))
        y = np.full((3, matrix.shape[1]), np.nan, np.float32)
        found = metal_ops.plan(layer.work(operation, 3, dtype), device.limits, kernel)
        layer.run(device, found, x, y)
        exact = x.astype(np.float64)
        terms = (columns if operation == "product" else rows) + 2
        bound = 2 * terms * _EPS * (np.abs(exact) @ np.abs(matrix)) + 2.0**-126
        worst = float(np.max(np.abs(y - exact @ matrix) / bound))
        if not worst <= 1:
            raise AssertionError(f"{worst:.3g} times the bound")
        return f"{worst:.3f} of the bound"

    return _try("right", f"{kernel or 'dense_sparse'} {layer.manifold} {dtype}", check)


def _inside_jit(backend: str) -> Iterator[Line]:
    """The whole way from a jitted function to the GPU and back."""
    import jax
    import jax.numpy as jnp

    from upg_jax._sparse_dense import sparse_dense, use_backend

    size = 257
    rng = np.random.default_rng(2)
    layer = MdCSR.from_dense(rng.standard_normal((size, size)).astype(np.float32), density=0.3)
    x = jnp.asarray(rng.standard_normal((2, size)), jnp.float32)
    w = np.abs(np.asarray(layer.to_dense("float32"), np.float64))

    def compare(function: Callable[[Any], Any], magnitude: np.ndarray) -> str:
        with use_backend("reference"):
            expected = np.asarray(jax.jit(function)(x), np.float64)
        with use_backend(backend):
            found = np.asarray(jax.jit(lambda x: function(x))(x))
        # Either result may be off by the bound of a product.
        bound = 4 * (size + 2) * _EPS * magnitude
        worst = float(np.max(np.abs(found - expected) / bound))
        if not worst <= 1:
            raise AssertionError(f"{worst:.3g} times the bound")
        return f"{worst:.3f} of the bound"

    magnitude = np.abs(np.asarray(x, np.float64)) @ w.T
    yield _try("jax", "product inside jit", lambda: compare(lambda x: sparse_dense(x, layer), magnitude))
    gradient = jax.grad(lambda x: sparse_dense(x, layer).sum())
    yield _try("jax", "gradient inside jit", lambda: compare(gradient, np.ones((2, size)) @ w))

    def scan() -> str:
        steps = 100

        def step(x: Any, _: Any) -> Any:
            return sparse_dense(x, layer) / size, None

        with use_backend(backend):
            loop = jax.jit(lambda x: jax.lax.scan(step, x, None, length=steps)[0])
            loop(x).block_until_ready()
            begin = time.perf_counter()
            loop(x).block_until_ready()
        return f"{(time.perf_counter() - begin) / steps * 1e6:.0f} us for each product of a scan"

    yield _try("jax", "products in a loop", scan)


def _element(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def _time(device: Device, shapes: tuple[tuple[int, int], ...]) -> Iterator[Line]:
    tiny = _Layer(device, (32, 64), 0.5, "unit")

    def wait() -> str:
        gpu, wall = _timed(device, tiny, "sparse_matvec_simd")
        return f"{wall * 1e6:.0f} us from call to result, {gpu * 1e6:.0f} us of it on the GPU"

    yield _try("fast", "smallest product, one wait", wait)
    bandwidth = 0.0

    def read() -> str:
        nonlocal bandwidth
        bandwidth = _read_bandwidth(device, 256 << 20 if len(shapes) > 1 else 1 << 20)
        return f"{bandwidth / 1e9:.1f} GB/s"

    yield _try("fast", "reading memory", read)
    for shape in shapes:
        for density in _DENSITIES:
            for manifold in _MANIFOLDS:
                layer = _Layer(device, shape, density, manifold)
                for kernel in PRODUCT_KERNELS:
                    yield _time_product(device, layer, density, kernel, bandwidth)


def _time_product(device: Device, layer: _Layer, density: float, kernel: str, bandwidth: float) -> Line:
    def work() -> str:
        gpu, wall = _timed(device, layer, kernel)
        share = layer.nbytes / gpu / bandwidth if bandwidth else math.nan
        return f"{gpu * 1e6:.0f} us on the GPU, {wall * 1e6:.0f} us in all, {share:.0%} of the memory's speed"

    rows, columns = layer.shape
    return _try("fast", f"{rows}x{columns} at {density} {layer.manifold}, {kernel}", work)


def _timed(device: Device, layer: _Layer, kernel: str) -> tuple[float, float]:
    """Median seconds on the GPU and on the clock, for one vector."""
    x = np.random.default_rng(1).standard_normal((1, layer.shape[1])).astype(np.float32)
    y = np.empty((1, layer.shape[0]), np.float32)
    found = metal_ops.plan(layer.work("product", 1, "float32"), device.limits, kernel)
    gpu, wall = [], []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        gpu.append(layer.run(device, found, x, y))
        wall.append(time.perf_counter() - begin)
    return float(np.median(gpu)), float(np.median(wall))


def _read_bandwidth(device: Device, nbytes: int) -> float:
    """Bytes a second at which a plain kernel reads memory."""
    source = Source("read_all", _READ, tuple(("read_all", i + 1) for i in range(_READ.count("\n") + 1)), {})
    data, _pages = _kept(device, np.arange(nbytes // 4, dtype=np.uint32))
    threads, groups = 256, min(1024, nbytes // 4096)
    sums = np.empty(threads * groups, np.uint32)
    buffers = {0: data, 1: Memory(sums.ctypes.data, sums.nbytes, written=True)}
    constants = {2: np.uint32(nbytes // 16).tobytes()}
    launch = Launch(source, "read_all", buffers, constants, (groups, 1, 1), (threads, 1, 1))
    seconds = float(np.median([device.run([launch]) for _ in range(_REPEATS)]))
    expected = (np.arange(nbytes // 4, dtype=np.uint64)).sum() % 2**32
    if sums.sum(dtype=np.uint64) % 2**32 != expected:
        raise AssertionError("the sum of what was read is wrong")
    return nbytes / seconds


def as_text(lines: list[Line]) -> str:
    """The report as a block to paste into an issue."""
    width = max(len(line.name) for line in lines)
    text, section = ["```text"], ""
    for line in lines:
        if line.section != section:
            section = line.section
            text.append(f"[{section}]")
        text.append(f"{'ok  ' if line.ok else 'FAIL'} {line.name:<{width}}  {line.found}")
    failed = sum(not line.ok for line in lines)
    text.append(f"{failed} of {len(lines)} failed" if failed else f"all {len(lines)} ok")
    return "\n".join([*text, "```"])
