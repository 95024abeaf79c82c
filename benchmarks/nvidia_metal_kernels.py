"""The Metal kernels on an NVIDIA GPU: checked against NumPy, and timed against the bandwidth of a copy.

Needs NumPy, the NVIDIA driver and NVRTC (the wheel nvidia-cuda-nvrtc-cu12 or -cu13, or a CUDA toolkit); no JAX. Prints
a line per result and appends JSON lines to a file.

    python benchmarks/nvidia_metal_kernels.py [--check] [--sweep] [--out rows.jsonl]
    compute-sanitizer --tool memcheck python benchmarks/nvidia_metal_kernels.py --check

`--check` only checks; `--sweep` times other macros and threadgroups, too.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nvidia_driver import Cuda, Gpu, up
from nvidia_layers import Layers, garbage, valid

import metal_ops

EPS = 2.0**-24
SHAPES = ((7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920))  # Phi-4's projections
PRODUCTS = ("sparse_matvec", "sparse_matvec_shared", "sparse_matvec_simd", "sparse_matvec_batch")
DTYPES = ("float32", "float16", "bfloat16")
PARTS = (1056, 264, 528, 2112)  # of the rows in timed transposed products


def as_read(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """`x` rounded to a dtype: what a kernel reads, and its value in float64."""
    if dtype == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    rounded = x.astype(dtype)
    return rounded, rounded.astype(np.float64)


def ratio(y: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, terms: int) -> float:
    """Largest error over the design's bound (docs/design.md, Numerics)."""
    bound = 2 * terms * EPS * magnitude + EPS * np.abs(exact) + 2.0**-126
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(np.isnan(y), np.inf, np.abs(y - exact) / bound), initial=0))


def check_layers(gpu: Gpu, layers: Layers, label: str, report) -> bool:
    """Every kernel and dtype on a stack."""
    cuda, (rows, columns), rng = gpu.cuda, layers.shape, np.random.default_rng(1)
    stack, groups, vectors, parts = len(layers.values), 3, 5, 7
    index = np.array([0, stack - 1, -5], np.int32)
    placed = gpu.put(layers)
    chosen = [0, stack - 1, 0]
    dense = np.zeros((stack, rows, columns), np.float32)
    magnitude, counts = np.zeros((2, stack, rows, columns))
    for s, r in itertools.product(range(stack), range(rows)):
        at, levels = layers.row(s, r)
        np.add.at(dense[s, r], at, levels.astype(np.float32))
        np.add.at(magnitude[s, r], at, np.abs(levels))
        np.add.at(counts[s, r], at, 1)
    scales = layers.scales.astype(np.float64)[:, :, None]
    w, size = dense * scales, magnitude * scales
    # The longest chain of additions along a row or a column, and the parts of the transposed product.
    terms = int(max(counts.sum(2).max(initial=0), counts.sum(1).max(initial=0) + parts)) + 2
    out = {9: cuda.put(np.full(dense.size, np.nan, np.float32))}
    gpu.decode(layers, {**placed, **out})()
    found = cuda.get(out[9], dense.shape)
    same = np.array_equal(found, dense * layers.scales[:, :, None])
    good = report(kind="check", kernel="mdcsr_decode", planes=label, manifold=layers.manifold, ok=bool(same))
    bias = rng.standard_normal((stack, rows)).astype(np.float32)
    for name, dtype in itertools.product((*PRODUCTS, "dense_sparse"), DTYPES):
        back = name == "dense_sparse"
        read, x = as_read(
            rng.standard_normal((groups, vectors, rows if back else columns)).astype(np.float32), dtype
        )
        shape = (groups, vectors, columns if back else rows)
        buffers = {**placed, 0: cuda.put(read), 7: cuda.put(index), 8: cuda.put(bias)}
        buffers |= {
            9: cuda.put(np.full(shape, np.nan, np.float32)),
            11: cuda.empty(4 * math.prod(shape) * parts),
        }
        if back:
            for launch in gpu.transposed(layers, buffers, dtype, vectors, groups, parts):
                launch()
            exact = np.stack([x[g] @ w[s] for g, s in enumerate(chosen)])
            bound = np.stack([np.abs(x[g]) @ size[s] for g, s in enumerate(chosen)])
        else:
            gpu.product(name, layers, buffers, dtype, vectors, groups, bias=True)()
            exact = np.stack([x[g] @ w[s].T + bias[s] for g, s in enumerate(chosen)])
            bound = np.stack([np.abs(x[g]) @ size[s].T + np.abs(bias[s]) for g, s in enumerate(chosen)])
        error = ratio(cuda.get(buffers[9], shape), exact, bound, terms)
        good &= report(
            kind="check", kernel=name, planes=label, manifold=layers.manifold, dtype=dtype, error_over_bound=error,
            ok=error <= 1,
        )  # fmt: skip
        gpu.free({i: buffers[i] for i in (0, 7, 8, 9, 11)})
    gpu.free(placed | out)
    return good


def check(gpu: Gpu, report) -> bool:
    good = True
    for manifold in ("unit", "prime"):
        for (rows, columns), alignment in itertools.product(((67, 300), (33, 1999)), (1, 8)):
            layers = valid((rows, columns), 0.3, manifold, 3, alignment, rows)
            good &= check_layers(gpu, layers, f"valid-{rows}x{columns}-align{alignment}", report)
        for seed in range(4):
            good &= check_layers(gpu, garbage((9, 300), manifold, 3, 403, seed), f"garbage-{seed}", report)
    return good


def copy_bandwidth(cuda: Cuda) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    size = 1 << 30
    a, b = cuda.empty(size), cuda.empty(size)
    seconds = cuda.seconds([lambda: cuda("cuMemcpyDtoDAsync_v2", b, a, ctypes.c_size_t(size), cuda.stream)])
    for address in (a, b):
        cuda("cuMemFree_v2", address)
    return 2 * size / seconds


class Timed:
    """A layer on the GPU in so many copies that no launch finds in a cache what an earlier one read."""

    def __init__(self, gpu: Gpu, report, bandwidth: float, one: Layers, facts: dict) -> None:
        self.gpu, self.report, self.bandwidth, self.one, self.facts = gpu, report, bandwidth, one, facts
        self.copies = max(2, up(400 << 20, one.bytes_read))
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        repeated = {
            name: np.repeat(array, self.copies, axis=0) if isinstance(array, np.ndarray) else array
            for name, array in fields.items()
        }
        self.layers, longest = Layers(**repeated), max(one.shape)
        x = np.random.default_rng(0).standard_normal((16, longest)).astype(np.float32)
        self.index = [gpu.cuda.put(np.array([i], np.int32)) for i in range(self.copies)]
        self.buffers = gpu.put(self.layers) | {
            0: gpu.cuda.put(x),
            9: gpu.cuda.empty(4 * 16 * longest),
            11: gpu.cuda.empty(4 * max(PARTS) * one.shape[1]),
        }

    def free(self) -> None:
        self.gpu.free(self.buffers | dict(enumerate(self.index, 100)))

    def _row(self, kernel: str, seconds: float, moved: int, **facts: object) -> None:
        share = moved / seconds / self.bandwidth
        self.report(
            kind="time", kernel=kernel, **self.facts, **facts, copies=self.copies, microseconds=seconds * 1e6,
            fraction_of_bandwidth=share, ok=True,
        )  # fmt: skip

    def product(self, kernel: str, dtype: str, vectors: int, threads: int = 128, **macros: int) -> None:
        launches = [
            self.gpu.product(
                kernel, self.layers, {**self.buffers, 7: i}, dtype, vectors, 1, threads=threads, macros=macros
            )
            for i in self.index
        ]
        seconds = self.gpu.cuda.seconds(launches)
        facts = {"dtype": dtype, "vectors": vectors, "threads": threads, **macros}
        self._row(kernel, seconds, self.one.bytes_read, **facts)

    def transposed(self, parts: int) -> None:
        pairs = [
            self.gpu.transposed(self.layers, {**self.buffers, 7: i}, "float32", 1, 1, parts)
            for i in self.index
        ]
        seconds = 2 * self.gpu.cuda.seconds([launch for pair in pairs for launch in pair])
        self._row("dense_sparse", seconds, self.one.bytes_read, dtype="float32", vectors=1, parts=parts)

    def decode(self) -> None:
        rows, columns = self.one.shape
        buffers = self.gpu.put(self.one) | {9: self.gpu.cuda.empty(4 * rows * columns)}
        seconds = self.gpu.cuda.seconds([self.gpu.decode(self.one, buffers)])
        self.gpu.free(buffers)
        self._row("mdcsr_decode", seconds, self.one.bytes_read + 4 * rows * columns)


def timings(gpu: Gpu, report, sweep: bool) -> None:
    bandwidth = copy_bandwidth(gpu.cuda)
    report(kind="bandwidth", gigabytes_per_second=bandwidth * 1e-9, ok=True)
    cases = itertools.product(SHAPES, (0.1, 0.5), ("unit", "prime"), (1, 16))
    for (rows, columns), density, manifold, alignment in cases:
        one = valid((rows, columns), density, manifold, 1, alignment, 0)
        facts = {
            "rows": rows,
            "columns": columns,
            "density": density,
            "manifold": manifold,
            "align": alignment,
        }
        case = Timed(gpu, report, bandwidth, one, facts)
        for kernel, dtype in itertools.product(PRODUCTS[:3], ("float32", "bfloat16")):
            if alignment == 1 or kernel == "sparse_matvec_simd":
                case.product(kernel, dtype, 1)
        if alignment == 1:
            for vectors in (4, 16):
                case.product("sparse_matvec_batch", "bfloat16", vectors)
            for parts in PARTS if sweep else PARTS[:1]:
                case.transposed(parts)
            case.decode()
        if alignment == 1 and sweep:
            others(case)
        case.free()


def others(case: Timed) -> None:
    """Other macros and threadgroups."""
    for entries, rows, threads in itertools.product((4, 8, 16), (1, 2), (64, 128, 256)):
        macros = {"LANE_ENTRIES": entries, "ROWS_PER_SIMDGROUP": rows}
        case.product("sparse_matvec_simd", "bfloat16", 1, threads, **macros)
    for entries, rows, threads in itertools.product((4, 8), (2, 4, 8), (128, 256, 512)):
        macros = {"LANE_ENTRIES": entries, "ROWS_PER_SIMDGROUP": rows}
        case.product("sparse_matvec_shared", "bfloat16", 1, threads, **macros)
    for entries, vectors in itertools.product((4, 8), (4, 8, 16)):
        macros = {"LANE_ENTRIES": entries, "VECTORS_PER_PASS": vectors}
        case.product("sparse_matvec_batch", "bfloat16", 16, 128, **macros)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check results")
    parser.add_argument("--sweep", action="store_true", help="time other macros and threadgroups, too")
    parser.add_argument("--out", type=Path, default=Path("nvidia_metal_kernels.jsonl"))
    options = parser.parse_args()
    cuda = Cuda()
    gpu = Gpu(cuda)
    where = {
        "gpu": cuda.name,
        "architecture": cuda.architecture,
        "nvrtc": ".".join(map(str, metal_ops.nvrtc_version())),
    }
    with options.out.open("a", encoding="utf-8") as rows:

        def report(*, ok: bool, **row: object) -> bool:
            rows.write(json.dumps({**where, "time": time.time(), "ok": ok, **row}) + "\n")
            rows.flush()
            values = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
            print("" if ok else "FAILED", *values, flush=True)
            return ok

        good = check(gpu, report)
        if not options.check:
            timings(gpu, report, options.sweep)
    print("all checks passed" if good else "SOME CHECKS FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
