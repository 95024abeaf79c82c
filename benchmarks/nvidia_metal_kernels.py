"""The Metal kernels on an NVIDIA GPU: checked against NumPy, and timed against the bandwidth of a copy.

Needs NumPy, the NVIDIA driver and NVRTC (the wheel nvidia-cuda-nvrtc-cu12 or -cu13, or a CUDA toolkit); no JAX. Prints
a line per result and appends JSON lines to a file.

    python benchmarks/nvidia_metal_kernels.py [--check] [--sweep] [--out rows.jsonl]
    compute-sanitizer --tool memcheck python benchmarks/nvidia_metal_kernels.py --check

`--check` only checks; `--sweep` times `sparse_matvec_simd` with other macros and threadgroups, too.
"""

from __future__ import annotations

import argparse
import contextlib
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
PARTS = 264  # of the rows in a timed transposed product


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


def timings(gpu: Gpu, report, sweep: bool) -> None:
    cuda, rng = gpu.cuda, np.random.default_rng(0)
    bandwidth = copy_bandwidth(cuda)
    report(kind="bandwidth", gigabytes_per_second=bandwidth * 1e-9, ok=True)
    for (rows, columns), density, manifold in itertools.product(SHAPES, (0.1, 0.5), ("unit", "prime")):
        one = valid((rows, columns), density, manifold, 1, 16, 0)
        # Copies of the layer beyond any cache: a launch reads what none of the last ones did.
        copies = max(2, up(400 << 20, one.bytes_read))
        repeat = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        for name in ("values", "deltas", "primes", "scales", "row_pointers"):
            if repeat[name] is not None:
                repeat[name] = np.repeat(np.asarray(repeat[name]), copies, axis=0)
        layers = Layers(**repeat)
        placed, longest = gpu.put(layers), max(rows, columns)
        x = rng.standard_normal((16, longest)).astype(np.float32)
        index = [cuda.put(np.array([i], np.int32)) for i in range(copies)]
        placed |= {0: cuda.put(x), 9: cuda.empty(4 * 16 * longest), 11: cuda.empty(4 * PARTS * columns)}
        case = {"rows": rows, "columns": columns, "density": density, "manifold": manifold}

        def time_of(
            name: str, launch, count: int = copies, case=case, one=one, index=index, placed=placed, **facts
        ):
            launches = [launch({**placed, 7: index[i]}) for i in range(count)]
            launches = [one for each in launches for one in (each if isinstance(each, list) else [each])]
            per_layer = cuda.seconds(launches) * len(launches) / count
            report(
                kind="time", kernel=name, **case, **facts, copies=count, microseconds=per_layer * 1e6,
                fraction_of_bandwidth=one.bytes_read / per_layer / bandwidth, ok=True,
            )  # fmt: skip

        for name, dtype in itertools.product(PRODUCTS[:3], ("float32", "bfloat16")):
            time_of(
                name,
                lambda b, n=name, d=dtype, held=layers: gpu.product(n, held, b, d, 1, 1),
                dtype=dtype,
                vectors=1,
            )
        few = min(copies, 8)
        for vectors in (4, 16):

            def batch(buffers: dict, vectors: int = vectors, held: Layers = layers):
                return gpu.product("sparse_matvec_batch", held, buffers, "bfloat16", vectors, 1)

            time_of("sparse_matvec_batch", batch, few, dtype="bfloat16", vectors=vectors)

        def back(buffers: dict, held: Layers = layers) -> list:
            return gpu.transposed(held, buffers, "float32", 1, 1, PARTS)

        time_of("dense_sparse", back, few, dtype="float32", vectors=1, parts=PARTS)
        if sweep:
            for lane, each, threads in itertools.product((4, 8, 16), (1, 2, 4), (64, 128, 256)):
                macros = {"LANE_ENTRIES": lane, "ROWS_PER_SIMDGROUP": each}
                with contextlib.suppress(RuntimeError):
                    time_of(
                        PRODUCTS[2],
                        lambda b, held=layers, m=macros, t=threads: gpu.product(
                            PRODUCTS[2], held, b, "bfloat16", 1, 1, threads=t, macros=m
                        ),
                        dtype="bfloat16", vectors=1, threads=threads, **macros,
                    )  # fmt: skip
        gpu.free(placed | dict(enumerate(index, 100)))
        if rows * columns < 60_000_000:
            decoded = gpu.put(one) | {9: cuda.empty(4 * rows * columns)}
            seconds = cuda.seconds([gpu.decode(one, decoded)])
            moved = one.bytes_read + 4 * rows * columns
            report(
                kind="time", kernel="mdcsr_decode", **case, microseconds=seconds * 1e6,
                fraction_of_bandwidth=moved / seconds / bandwidth, ok=True,
            )  # fmt: skip
            gpu.free(decoded)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check results")
    parser.add_argument("--sweep", action="store_true", help="time other macros of sparse_matvec_simd, too")
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
