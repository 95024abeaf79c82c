"""`sparse_dense` inside jit on an NVIDIA GPU, beside cuBLAS, cuSPARSE and JAX's own sparse product.

    python -m benchmarks.nvidia --out rows.jsonl [--topics product batches ...] [--shapes 5120x5120 ...]

Every row is one product, in microseconds: programs of many products, which XLA captures in CUDA graphs, over copies of
the matrix that together exceed the L2 cache; medians of repeats. torch's products are captured in graphs, too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import upg_jax
from benchmarks._nvidia_peers import bcsr, copy_bandwidth, cublas, cusparse
from benchmarks._nvidia_timing import compiled, copies_of, microseconds, over_stack
from upg_jax import MdCSR, sparse_dense
from upg_jax._sparse_dense import _cuda_lowering
from upg_jax._sparse_dense._primitive import operands

Shapes: TypeAlias = tuple[tuple[int, int], ...]
SHAPES: Shapes = ((35840, 5120), (5120, 5120), (5120, 17920), (7680, 5120))  # Phi-4's projections
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


def product(shapes: Shapes = SHAPES) -> Iterator[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    yield {"topic": "bandwidth", "gigabytes_per_second": bandwidth}
    for rows, columns in shapes:
        case = {"topic": "product", "rows": rows, "columns": columns, "batch": 1}
        for row in cublas(rows, columns, 1):
            yield {**case, **row}
        for density in (0.1, 0.5):
            yield {**case, **cusparse(rows, columns, density)}
        for density, manifold in itertools.product((0.1, 0.5), ("unit", "prime")):
            yield from of_layer(case, density, manifold, (1,), ("auto", "auto, then silu"), bandwidth)


def batches(shapes: Shapes = (*SHAPES[:3], (1536, 1536))) -> Iterator[dict[str, Any]]:
    for rows, columns in shapes:
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


def others(shapes: Shapes = SHAPES[:2]) -> Iterator[dict[str, Any]]:
    """`g @ W` for one vector and for eight, decoding to dense, and what `jax.experimental.sparse` takes."""
    for density in (0.1, 0.5):
        rows, columns = SHAPES[1]
        case = {"topic": "product", "rows": rows, "columns": columns, "batch": 1}
        yield {**case, **bcsr(rows, columns, density)}
    for (rows, columns), density, manifold in itertools.product(shapes, (0.1, 0.5), ("unit", "prime")):
        copies = copies_of(rows * columns * density * (2 if manifold == "unit" else 4))
        stack = planes(rows, columns, density, manifold, copies)
        case = {"rows": rows, "columns": columns, "density": density, "manifold": manifold}
        for batch, algorithm in itertools.product((1, 8), ("sparse", "dense")):
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
    copies = copies_of(rows * columns * density * (2 if manifold == "unit" else 4))
    stack = planes(rows, columns, density, manifold, copies)
    read = sum(a.nbytes for a in jax.tree.leaves(stack)) / copies
    calls = compiled(
        {
            (batch, dtype, algorithm): (
                over_stack(sparse(algorithm), copies),
                jax.random.normal(jax.random.key(9), (batch, columns), dtype),
                stack,
            )
            for batch, dtype, algorithm in itertools.product(counts, ("bfloat16", "float32"), algorithms)
            if len(counts) == 1 or algorithm != "sparse" or batch <= 128  # far beyond where the two meet
        }
    )
    for (batch, dtype, algorithm), call in calls.items():
        row = {
            **case, "batch": batch, "density": density, "manifold": manifold, "dtype": dtype,
            "contender": f"upg_jax {algorithm}", "copies": copies,
        }  # fmt: skip
        if isinstance(call, Exception):
            row["error"] = str(call)[:300]
        else:
            row["microseconds"] = microseconds(call, copies)
            if bandwidth:
                row["fraction_of_copy"] = read / row["microseconds"] * 1e-3 / bandwidth
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = {"product": product, "batches": batches, "others": others}
    parser.add_argument("--out", type=Path, default=Path("nvidia.jsonl"))
    parser.add_argument("--topics", nargs="+", choices=list(topics), default=list(topics))
    parser.add_argument("--shapes", nargs="+", help="ROWSxCOLUMNS; by default each topic's own")
    options = parser.parse_args()
    shapes = [tuple(tuple(map(int, shape.split("x"))) for shape in options.shapes)] if options.shapes else []
    where = {"gpu": jax.devices()[0].device_kind, "jax": jax.__version__, "upg_jax": upg_jax.__version__}
    with options.out.open("a", encoding="utf-8") as out:
        for topic in options.topics:
            for row in topics[topic](*shapes):
                out.write(json.dumps({**where, "time": time.time(), **row}) + "\n")
                out.flush()
                print(
                    *[f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()],
                    flush=True,
                )


if __name__ == "__main__":
    main()
