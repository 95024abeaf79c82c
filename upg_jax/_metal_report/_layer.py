"""Layers for the report, in memory that a device keeps as it keeps a mapped file."""

from __future__ import annotations

import math
import mmap
from typing import Any

import ml_dtypes
import numpy as np

import metal_ops
from metal_ops import Device, Memory, Work
from upg_jax._mdcsr import MdCSR

MANIFOLDS = ("unit", "prime")
TRANSPOSED, DECODE = "dense_sparse", "mdcsr_decode"

# Rows that are encoded; the others repeat them.
_DISTINCT_ROWS = 256


class Layer:
    """A random layer, several times.

    Args:
        device: that keeps it.
        shape: of the matrix (features out, features in).
        density: share of weights that are not zero, in most rows.
        manifold: `"unit"` or `"prime"`.
        beyond: bytes that all copies together have at least, so that none stays in a cache.

    Attributes:
        nbytes: of the planes.
        weight: the matrix in float32; None where rows repeat.
    """

    def __init__(
        self, device: Device, shape: tuple[int, int], density: float, manifold: str, beyond: int = 0
    ) -> None:
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
        self.shape, self.manifold, self.capacity = shape, manifold, used * times
        self.nbytes = sum(plane.nbytes for plane in planes.values())
        self.weight = np.asarray(encoded.to_dense("float32")) if rows == distinct else None
        kept = [
            {name: keep(device, plane) for name, plane in planes.items()}
            for _ in range(max(math.ceil(beyond / self.nbytes), 1))
        ]
        self._pages = [pages for copy in kept for _, pages in copy.values()]
        table = {"prime_table": device.resident(metal_ops.prime_table().tobytes())}
        self._copies = [{name: memory for name, (memory, _) in copy.items()} | table for copy in kept]

    def plan(self, device: Device, kernel: str, vectors: int, dtype: str) -> metal_ops.Plan:
        """How a kernel is launched: one of `PRODUCT_KERNELS`, `TRANSPOSED` or `DECODE`."""
        operation: Any = {TRANSPOSED: "transposed", DECODE: "decode"}.get(kernel, "product")
        manifold: Any = self.manifold
        work = Work(operation, *self.shape, self.capacity, 1, 1, vectors, manifold, dtype)
        return device.plan(work, kernel if operation == "product" else None)

    def arrays(self, kernel: str, vectors: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Random vectors for a kernel, and memory for its result, full of NaN."""
        rows, columns = self.shape
        features, results = (rows, columns) if kernel == TRANSPOSED else (columns, rows)
        element = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        x = np.random.default_rng(1).standard_normal((vectors, features)).astype(element)
        return x, np.full(self.shape if kernel == DECODE else (vectors, results), np.nan, np.float32)

    def run(self, device: Device, plan: metal_ops.Plan, x: np.ndarray, y: np.ndarray, copy: int = 0) -> float:
        """Runs a plan over one of the copies; returns the GPU's seconds."""
        index = np.zeros(1, np.int32)
        given = {"x": memory_of(x), "index": memory_of(index)}
        given["y"] = Memory(y.ctypes.data, y.nbytes, written=True)
        return device.run(plan.launches({**self._copies[copy % len(self._copies)], **given}))


def memory_of(array: np.ndarray) -> Memory:
    """An array as memory to read."""
    return Memory(array.ctypes.data, array.nbytes)


def keep(device: Device, array: np.ndarray) -> tuple[Memory, mmap.mmap]:
    """A copy in pages that live as long as the second result."""
    pages = mmap.mmap(-1, max(array.nbytes, 1))
    view = np.frombuffer(pages, np.uint8)[: array.nbytes]
    view[:] = array.view(np.uint8).reshape(-1)
    device.keep(view.ctypes.data, array.nbytes, pages)
    return memory_of(view), pages
