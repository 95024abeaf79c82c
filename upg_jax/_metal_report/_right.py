"""Do the kernels compile, and are their results right?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from typing import Any

import numpy as np

import metal_ops
from metal_ops import PRODUCT_KERNELS, Device
from upg_jax._mdcsr import MdCSR
from upg_jax._metal_report._layer import DECODE, MANIFOLDS, TRANSPOSED, Layer
from upg_jax._metal_report._line import Line, attempt

SOURCES = (*PRODUCT_KERNELS, TRANSPOSED, DECODE)
_DTYPES = ("float32", "float16", "bfloat16")
_SHAPE = (67, 1031)
_EPS = 2.0**-24


def compiling(device: Device) -> Iterator[Line]:
    """A line for each of `SOURCES`."""
    for name in SOURCES:

        def compile_all(name: str = name) -> str:
            source = metal_ops.load_source(name)
            begin = time.perf_counter()
            kernels = list(metal_ops.translate(source).signatures)
            threads = [device.max_threads(source, kernel) for kernel in kernels]
            seconds = time.perf_counter() - begin
            return f"{len(kernels)} kernels in {seconds:.1f} s, threadgroups up to {min(threads)} threads"

        yield attempt("compiles", name, compile_all)


def checking(device: Device, compiled: Set[str]) -> Iterator[Line]:
    """Kernels against NumPy, each in every manifold and dtype."""

    def self_check() -> str:
        metal_ops.check_device(device)
        return "exact"

    yield attempt("right", "self-check", self_check)
    for manifold in MANIFOLDS:
        layer = Layer(device, _SHAPE, 0.3, manifold)
        for kernel in [name for name in SOURCES if name in compiled]:
            for dtype in _DTYPES if kernel != DECODE else ("float32",):
                yield _check(device, layer, kernel, dtype)


def _check(device: Device, layer: Layer, kernel: str, dtype: str) -> Line:
    def check() -> str:
        w = np.asarray(layer.weight)
        x, y = layer.arrays(kernel, 3, dtype)
        layer.run(device, layer.plan(device, kernel, 3, dtype), x, y)
        if kernel == DECODE:
            if not np.array_equal(y, w):
                raise AssertionError(f"{np.count_nonzero(y != w)} weights differ")
            return "exact"
        matrix = (w if kernel == TRANSPOSED else w.T).astype(np.float64)
        exact = x.astype(np.float64)
        return _within(y - exact @ matrix, 2 * (matrix.shape[0] + 2), np.abs(exact) @ np.abs(matrix))

    shown = f"{kernel} {layer.manifold}" + (f" {dtype}" if kernel != DECODE else "")
    return attempt("right", shown, check)


def _within(errors: np.ndarray, roundings: int, magnitude: np.ndarray) -> str:
    """Says how much of the bound of docs/design.md the largest error is."""
    worst = float(np.max(np.abs(errors) / (roundings * _EPS * magnitude + 2.0**-126)))
    if not worst <= 1:
        raise AssertionError(f"{worst:.3g} times the bound")
    return f"{worst:.3f} of the bound"


def inside_jit(backend: str) -> Iterator[Line]:
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
        return _within(found - expected, 4 * (size + 2), magnitude)

    magnitude = np.abs(np.asarray(x, np.float64)) @ w.T
    yield attempt("jax", "product inside jit", lambda: compare(lambda x: sparse_dense(x, layer), magnitude))
    gradient = jax.grad(lambda x: sparse_dense(x, layer).sum())
    yield attempt("jax", "gradient inside jit", lambda: compare(gradient, np.ones((2, size)) @ w))

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

    yield attempt("jax", "products in a loop", scan)
