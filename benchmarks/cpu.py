"""The native CPU kernels against XLA's dense product, `jax.experimental.sparse` and scipy.

    python benchmarks/cpu.py [--size 5120] [--densities 0.1 0.5] [--batches 1 16 64] [--repeats 15] [--out rows.jsonl]

Writes one JSON object a line: the environment, then a row per case with every repeat of every contender in seconds,
medians, ratios and the share of the memory bandwidth that was used; then prints a table. Contenders take turns, so
that a busy moment hits all of them, and every call reads other copies of the matrix, so that nothing waits in a cache
for the next one: a model reads each of its matrices once per token, too. scipy's product is one-threaded.

`floors` in the rows are what the project promises of two cores with AVX-512: times as fast as each contender.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from reference import bcsr, environment, measure

from upg_jax import MdCSR, _native, sparse_dense, use_backend

COLD_BYTES = 128 << 20  # copies of a matrix add up to this, several times the cache
FLOORS = {
    (0.1, 1): {"dense": 6, "bcsr": 30, "scipy": 3},
    (0.5, 1): {"dense": 3},
    (0.1, 16): {"dense": 2.5},
    (0.1, 64): {"dense": 2.5},
    (0.5, 16): {"dense": 1},
    (0.5, 64): {"dense": 1},
}


def read_bandwidth(library: _native.Library) -> float:
    """Bytes a second that all cores read together: the best of several passes of the check of columns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    deltas = [np.ones(64 << 20, np.uint8) for _ in range(cores)]
    pointers = np.array([0, deltas[0].size], np.uint32)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(8):
            begin = time.perf_counter()
            list(pool.map(lambda d: library.first_row_outside(d, pointers, 2**31 - 1), deltas))
            best = min(best, time.perf_counter() - begin)
    return cores * deltas[0].size / best


def copies(make: Callable[[], object], nbytes: int) -> itertools.cycle:
    return itertools.cycle([make() for _ in range(max(2, -(-COLD_BYTES // max(nbytes, 1))))])


def contenders(layer: MdCSR, x: jax.Array, peers: bool) -> dict[str, Callable[[], object]]:
    """name -> a function without arguments that runs once and waits."""

    def jitted(f: Callable, first: object, operands: itertools.cycle) -> Callable[[], object]:
        compiled = jax.jit(f).lower(x, first).compile()
        return lambda: jax.block_until_ready(compiled(x, next(operands)))

    def again(tree: object) -> object:
        return jax.block_until_ready(jax.tree.map(jnp.array, tree))

    def transposed(g: jax.Array, layer: MdCSR) -> jax.Array:
        shape = (*g.shape[:-1], layer.in_features)
        return jax.linear_transpose(lambda x: sparse_dense(x, layer), jnp.zeros(shape))(g)[0]

    layers = copies(lambda: again(layer), layer.nbytes)
    calls = {
        "native": jitted(sparse_dense, layer, layers),
        "native transposed": jitted(transposed, layer, layers),
    }
    if not peers:
        return calls
    w = layer.to_dense(np.float32)
    # XLA's fastest forms: `x @ w.T` takes twenty times as long as `w @ x` for one vector, half as long again for many.
    if x.ndim == 1:
        calls["dense"] = jitted(lambda x, w: w @ x, w, copies(lambda: again(w), w.nbytes))
    else:
        calls["dense"] = jitted(lambda x, wt: x @ wt, w.T, copies(lambda: again(w.T), w.nbytes))
    if x.ndim == 1:
        sparse = bcsr(layer)
        nbytes = sum(a.nbytes for a in jax.tree.leaves(sparse))
        calls["bcsr"] = jitted(lambda x, m: m @ x, sparse, copies(lambda: again(sparse), nbytes))
        csr = scipy.sparse.csr_array(np.asarray(w))
        vector, matrices = np.asarray(x), copies(csr.copy, nbytes)
        calls["scipy"] = lambda: next(matrices) @ vector
    return calls


def row(case: dict, layer: MdCSR, x: jax.Array, seconds: dict[str, list[float]], bandwidth: float) -> dict:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        f"{name} / native": time / median["native"] for name, time in median.items() if name != "native"
    }
    floors = FLOORS.get((case["density"], case["batch"]), {}) if case["manifold"] == "unit" else {}
    moved = layer.nbytes + x.nbytes * (1 + layer.out_features / layer.in_features)
    return {
        "case": case,
        "median": median,
        "ratios": ratios,
        "floors": {name: {"floor": f, "met": ratios[f"{name} / native"] >= f} for name, f in floors.items()},
        "bytes": moved,
        "share of bandwidth": moved / median["native"] / bandwidth,
        "seconds": seconds,
    }


def rows(arguments: argparse.Namespace, bandwidth: float):
    rng = np.random.default_rng(0)
    size = arguments.size
    w = rng.standard_normal((size, size)).astype(np.float32)
    for density, manifold in itertools.product(arguments.densities, ("unit", "prime")):
        layer = MdCSR.from_dense(w, density=density, manifold=manifold)
        for batch in arguments.batches:
            shape = (size,) if batch == 1 else (batch, size)
            x = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
            case = {"size": size, "density": density, "manifold": manifold, "batch": batch}
            calls = contenders(layer, x, peers=True)
            yield row(case, layer, x, measure(calls, arguments.repeats), bandwidth)


def call_overhead(repeats: int) -> dict:
    """Microseconds that a 576 x 576 layer takes at batch 1 in a jitted chain, and a tiny one for the call alone."""
    out = {}
    rng = np.random.default_rng(0)
    for size, density in ((8, 0.5), (576, 0.1), (576, 0.5)):
        layer = MdCSR.from_dense(rng.standard_normal((size, size)).astype(np.float32), density=density)

        def chain(x: jax.Array, layer: MdCSR) -> jax.Array:
            for _ in range(64):
                x = sparse_dense(x, layer)
            return x

        x = jnp.zeros(size)
        compiled = jax.jit(chain).lower(x, layer).compile()
        call = lambda compiled=compiled, x=x, layer=layer: jax.block_until_ready(compiled(x, layer))  # noqa: E731
        seconds = measure({"chain": call}, repeats)["chain"]
        out[f"{size} at {density}"] = {"entries": layer.nnz, "us": 1e6 * statistics.median(seconds) / 64}
    return {"chain of 64": out}


def table(records: list[dict]) -> str:
    lines = [f"{'density':>7} {'manifold':>8} {'batch':>5} {'ms':>8} {'of bandwidth':>12}   times as fast as"]
    for record in records:
        case = record["case"]
        against = ", ".join(
            f"{name.removesuffix(' / native')} {ratio:.2f}" for name, ratio in record["ratios"].items()
        )
        lines.append(
            f"{case['density']:>7} {case['manifold']:>8} {case['batch']:>5} "
            f"{1e3 * record['median']['native']:>8.3f} {record['share of bandwidth']:>12.0%}   {against}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the layer")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the rows to this file instead of printing them")
    arguments = parser.parse_args()
    library = _native.load()
    if library is None:
        sys.exit(f"no native library: {_native.unavailable_reason()}")
    bandwidth = read_bandwidth(library)
    out = arguments.out.open("a") if arguments.out else sys.stdout
    head = {**environment(), "kernels": library.kernels, "read bandwidth": bandwidth}
    records = []
    with use_backend("native"):
        for record in itertools.chain([head, call_overhead(200)], rows(arguments, bandwidth)):
            print(json.dumps(record), file=out, flush=True)
            if "case" in record:
                records.append(record)
    print(table(records))


if __name__ == "__main__":
    sys.exit(main())
