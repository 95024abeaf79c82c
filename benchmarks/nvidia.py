"""`sparse_dense` inside jit on an NVIDIA GPU, beside cuBLAS, cuSPARSE and JAX's own sparse product.

    python -m benchmarks.nvidia --out rows.jsonl [--quick] [--topics product batches ...]

Every row is one product, in microseconds: programs of many products, which XLA captures in CUDA graphs, over copies of
the matrix that together exceed the L2 cache; medians of repeats. torch's products are captured in graphs, too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import upg_jax
from upg_jax import MdCSR, sparse_dense
from upg_jax._sparse_dense import _cuda_lowering
from upg_jax._sparse_dense._primitive import operands

SHAPES = ((35840, 5120), (5120, 5120), (5120, 17920), (7680, 5120))  # Phi-4's projections
CACHE = 300 << 20  # bytes that copies of a matrix take together
MOST_COPIES = 24
SMALL = (1536, 1536)
BATCHES = (8, 16, 32, 48, 64, 128, 512)


def planes(rows: int, columns: int, density: float, manifold: str, copies: int) -> MdCSR:
    """A stack of random layers, made on the device: its copies have the same planes."""

    @jax.jit
    def mask(key: jax.Array) -> jax.Array:
        kept = jax.random.uniform(key, (rows, columns)) < density
        return kept.at[:, ::255].set(True)  # no gap needs a filler

    kept = np.asarray(mask(jax.random.key(0)))
    flat = np.flatnonzero(kept)
    column = flat % columns
    deltas = np.diff(column, prepend=0)
    pointers = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.uint32)
    deltas[pointers[:-1]] = column[pointers[:-1]]
    rng = np.random.default_rng(0)
    pad = -flat.size % 64
    one = {
        "values": np.pad(rng.integers(1, 128, flat.size, np.int8), (0, pad)),
        "delta_indices": np.pad(deltas.astype(np.uint8), (0, pad)),
        "scales": np.full(rows, 2.0**-20, np.float32),
        "row_pointers": pointers,
    }
    if manifold == "prime":
        one["prime_indices"] = np.pad(rng.integers(0, 10_000, flat.size, np.uint16), (0, pad))
    layer = upg_jax.MdCSR(**{k: jnp.asarray(v) for k, v in one.items()}, shape=(rows, columns))
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (copies, *a.shape)) + jnp.zeros((), a.dtype), layer)


def copies_of(rows: int, columns: int, density: float, manifold: str) -> int:
    """How many layers exceed the cache, up to what a program may have of products."""
    size = rows * columns * density * (2 if manifold == "unit" else 4)
    return max(2, min(MOST_COPIES, int(-(-CACHE // size))))


def microseconds(call: Callable[[], Any], products: int, repeats: int = 7) -> float:
    """Of one product: programs are dispatched while earlier ones run, so that only the GPU counts."""
    y = jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        count = 1
        while True:
            start = time.perf_counter()
            for _ in range(count):
                del y  # its memory serves the next result, so that graphs stay as they are
                y = call()
            jax.block_until_ready(y)
            taken = time.perf_counter() - start
            if taken > 0.02:
                break
            count *= 2
        times.append(taken / count / products * 1e6)
    return statistics.median(times)


def over_stack(f: Callable[..., jax.Array], copies: int) -> Callable[..., jax.Array]:
    """One program of a product with every copy. Each depends on the last one, as layers of a model do.

    It returns one number that depends on all: as many results would cost the host more than the GPU takes.
    """

    def program(x: jax.Array, stack: Any) -> jax.Array:
        found = jnp.float32(0)
        for i in range(copies):
            x, y = jax.lax.optimization_barrier((x, f(x, stack, i)))
            found += y.reshape(-1)[0].astype(jnp.float32)
        return found

    return jax.jit(program)


def sparse(algorithm: str) -> Callable[..., jax.Array]:
    def f(x: jax.Array, stack: MdCSR, i: int) -> jax.Array:
        if algorithm.startswith("auto"):
            y = sparse_dense(x, stack, index=i)
            return jax.nn.silu(y) if "silu" in algorithm else y
        layout, scales, arrays = operands(stack)
        return _cuda_lowering.sparse_dense(
            x, scales, jnp.int32(i), *arrays, layout=layout, algorithm=algorithm, dtype=str(x.dtype)
        )

    return f


def graph_of_torch(f: Callable[[int], Any], copies: int) -> float:
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            f(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            f(i)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def cublas(rows: int, columns: int, batch: int) -> Iterator[dict[str, Any]]:
    """Dense bfloat16 by jitted JAX, alone and for one vector with what may fuse behind it, and by torch."""
    copies = max(2, min(MOST_COPIES, -(-CACHE // (2 * rows * columns))))
    stack = [jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(copies)]
    x = jax.random.normal(jax.random.key(9), (batch, columns), jnp.bfloat16)
    for then, act in (("", lambda y: y), (", then silu", jax.nn.silu))[: 2 if batch == 1 else 1]:
        call = over_stack(lambda x, s, i, act=act: act(x @ s[i].T), copies)
        taken = microseconds(functools.partial(call, x, stack), copies)
        yield {"contender": f"cuBLAS bf16 (jax){then}", "microseconds": taken}
    stack.clear()
    yield {"contender": "cuBLAS bf16 (torch)", "microseconds": torch_dense(rows, columns, batch, copies)}


def torch_dense(rows: int, columns: int, batch: int, copies: int) -> float:
    import torch

    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    taken = graph_of_torch(lambda i: torch.mm(x, weights[i].T), copies)
    weights.clear()
    torch.cuda.empty_cache()
    return taken


def cusparse(rows: int, columns: int, density: float) -> dict[str, Any]:
    """torch's product of a float32 CSR matrix and a vector, not captured in a graph."""
    import torch

    w = torch.randn(rows, columns, device="cuda") * (torch.rand(rows, columns, device="cuda") < density)
    copies = [w.to_sparse_csr() for _ in range(3)]
    x = torch.randn(columns, device="cuda")
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for copy in copies:
            torch.mv(copy, x)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(copies))
    del w, copies
    torch.cuda.empty_cache()
    return {
        "contender": "cuSPARSE float32 (torch)",
        "density": density,
        "microseconds": statistics.median(times),
    }


def bcsr(rows: int, columns: int, density: float) -> dict[str, Any]:
    """`jax.experimental.sparse`."""
    from jax.experimental import sparse as jax_sparse

    w = jax.random.normal(jax.random.key(0), (rows, columns))
    w = jnp.where(jax.random.uniform(jax.random.key(1), w.shape) < density, w, 0)
    matrix = jax_sparse.BCSR.fromdense(w)
    del w
    x = jax.random.normal(jax.random.key(9), (columns,))
    call = jax.jit(lambda m, x: m @ x)
    taken = microseconds(lambda: call(matrix, x), 1, 3)
    return {"contender": "BCSR float32 (jax)", "density": density, "microseconds": taken}


def copy_bandwidth() -> float:
    """Gigabytes a second, read and written, by torch's copy of 1 GiB."""
    import torch

    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    seconds = graph_of_torch(lambda i: b.copy_(a), 4) * 1e-6
    return 2 * a.numel() / seconds * 1e-9


def product(quick: bool) -> Iterator[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    yield {"topic": "bandwidth", "gigabytes_per_second": bandwidth}
    for rows, columns in SHAPES[:2] if quick else SHAPES:
        case = {"topic": "product", "rows": rows, "columns": columns, "batch": 1}
        for row in cublas(rows, columns, 1):
            yield {**case, **row}
        for density in (0.1, 0.5):
            yield {**case, **cusparse(rows, columns, density)}
        for density, manifold in itertools.product((0.1, 0.5), ("unit", "prime")):
            yield from of_layer(case, density, manifold, (1,), ("auto", "auto, then silu"), bandwidth)


def batches(quick: bool) -> Iterator[dict[str, Any]]:
    for rows, columns in SHAPES[1:2] if quick else (*SHAPES[:3], SMALL):
        case = {"topic": "batches", "rows": rows, "columns": columns}
        for batch in BATCHES:
            for row in cublas(rows, columns, batch):
                yield {**case, "batch": batch, **row}
        for density, manifold in (
            (0.1, "unit"),
            (0.25, "unit"),
            (0.5, "unit"),
            (0.1, "prime"),
            (0.5, "prime"),
        ):
            yield from of_layer(case, density, manifold, BATCHES, ("sparse", "dense"), None)


def others(quick: bool) -> Iterator[dict[str, Any]]:
    """`g @ W` for one vector and for eight, decoding to dense, and what `jax.experimental.sparse` takes."""
    rows, columns = SHAPES[1]
    for density in (0.1, 0.5):
        yield {
            "topic": "product",
            "rows": rows,
            "columns": columns,
            "batch": 1,
            **bcsr(rows, columns, density),
        }
    for (rows, columns), density, manifold in itertools.product(SHAPES[:2], (0.1, 0.5), ("unit", "prime")):
        copies = copies_of(rows, columns, density, manifold)
        stack = planes(rows, columns, density, manifold, copies)
        case = {"rows": rows, "columns": columns, "density": density, "manifold": manifold}
        for batch, algorithm in itertools.product((1,) if quick else (1, 8), ("sparse", "dense")):
            g = jax.random.normal(jax.random.key(9), (batch, rows))
            call = functools.partial(over_stack(transposed(algorithm), copies), g, stack)
            taken = microseconds(call, copies)
            yield {"topic": "g @ W", **case, "batch": batch, "contender": algorithm, "microseconds": taken}
        for dtype in ("bfloat16", "float32"):
            call = functools.partial(jax.jit(lambda layers, dtype=dtype: layers.to_dense(dtype)), stack)
            yield {"topic": "decode", **case, "dtype": dtype, "microseconds": microseconds(call, copies)}


def transposed(algorithm: str) -> Callable[..., jax.Array]:
    def f(g: jax.Array, stack: MdCSR, i: int) -> jax.Array:
        layout, scales, arrays = operands(stack)
        return _cuda_lowering.dense_sparse(
            g, scales, jnp.int32(i), *arrays, layout=layout, algorithm=algorithm
        )

    return f


def of_layer(
    case: dict[str, Any], density: float, manifold: str, counts: tuple[int, ...], algorithms: tuple[str, ...],
    bandwidth: float | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    rows, columns = case["rows"], case["columns"]
    copies = copies_of(rows, columns, density, manifold)
    stack = planes(rows, columns, density, manifold, copies)
    read = sum(a.nbytes for a in jax.tree.leaves(stack)) / copies
    for batch, dtype, algorithm in itertools.product(counts, ("bfloat16", "float32"), algorithms):
        if len(counts) > 1 and algorithm == "sparse" and batch > 128:
            continue  # far beyond where the two meet
        x = jax.random.normal(jax.random.key(9), (batch, columns), dtype)
        call = over_stack(sparse(algorithm), copies)
        row = {
            **case, "batch": batch, "density": density, "manifold": manifold, "dtype": dtype,
            "contender": f"upg_jax {algorithm}", "copies": copies,
        }  # fmt: skip
        try:
            row["microseconds"] = microseconds(functools.partial(call, x, stack), copies)
        except Exception as error:
            row["error"] = str(error)[:300]
        else:
            if bandwidth:
                row["fraction_of_copy"] = read / row["microseconds"] * 1e-3 / bandwidth
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = {"product": product, "batches": batches, "others": others}
    parser.add_argument("--out", type=Path, default=Path("nvidia.jsonl"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--topics", nargs="+", choices=list(topics), default=list(topics))
    options = parser.parse_args()
    where = {"gpu": jax.devices()[0].device_kind, "jax": jax.__version__, "upg_jax": upg_jax.__version__}
    with options.out.open("a", encoding="utf-8") as out:
        for topic in options.topics:
            for row in topics[topic](options.quick):
                out.write(json.dumps({**where, "time": time.time(), **row}) + "\n")
                out.flush()
                print(
                    *[f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()],
                    flush=True,
                )


if __name__ == "__main__":
    main()
