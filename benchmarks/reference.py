"""The reference lowering of `sparse_dense` against `jax.experimental.sparse` and XLA's dense product.

    python benchmarks/reference.py [--size 5120] [--repeats 15] [--out rows.jsonl]

Prints one JSON object a line: the environment, then a row per case with every repeat of every contender in
seconds, their medians and the ratios. Contenders take turns, so that a busy moment hits all of them.

Bounds that the project promises for the unit manifold (`within` in the rows): at one vector the reference is at
least 1.5 times as fast as BCSR; from 32 vectors on it takes at most three times the dense product plus one decode.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from upg_jax import MdCSR, sparse_dense, use_backend


def environment() -> dict:
    names = ("upg-jax", "jax", "jaxlib", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree"
    cpuinfo = Path("/proc/cpuinfo")
    fields = {}
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "simd": [flag for flag in flags if flag.startswith(("avx", "fma", "asimd", "sve"))],
        "device": str(jax.devices()[0]),
        "load": os.getloadavg(),
    }


def bcsr(layer: MdCSR) -> sparse.BCSR:
    """The decoded layer, its columns by running sums of the deltas."""
    dense = np.asarray(layer.to_dense(np.float32))
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(layer.out_features + 1)).astype(np.int32)
    parts = (dense[rows, columns], columns.astype(np.int32), indptr)
    return sparse.BCSR(tuple(map(jnp.asarray, parts)), shape=layer.shape)


def contenders(layer: MdCSR, x: jax.Array) -> dict:
    """name -> a function without arguments that runs once and waits."""
    dense = layer.to_dense(np.float32)
    programs = {
        "reference": (sparse_dense, (x, layer)),
        # XLA's CPU backend is 30 times slower on `x @ w.T` for one vector.
        "dense": (lambda x, w: jnp.einsum("...i,oi->...o", x, w), (x, dense)),
    }
    if x.ndim == 1:
        programs["bcsr"] = (lambda m, x: m @ x, (bcsr(layer), x))
    else:
        programs["decode"] = (lambda layer: layer.to_dense(np.float32), (layer,))
    calls = {}
    for name, (f, args) in programs.items():
        compiled = jax.jit(f).lower(*args).compile()
        calls[name] = lambda compiled=compiled, args=args: jax.block_until_ready(compiled(*args))
    return calls


def measure(calls: dict, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def row(case: dict, seconds: dict[str, list[float]]) -> dict:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    if "bcsr" in median:
        ratios = {"bcsr / reference": median["bcsr"] / median["reference"]}
        within = ratios["bcsr / reference"] >= 1.5
    else:
        bound = median["dense"] + median["decode"]
        ratios = {"reference / (dense + decode)": median["reference"] / bound}
        within = ratios["reference / (dense + decode)"] <= 3
    ratios["reference / dense"] = median["reference"] / median["dense"]
    return {"case": case, "median": median, "ratios": ratios, "within": within, "seconds": seconds}


def rows(size: int, repeats: int):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size)).astype(np.float32)
    for manifold in ("unit", "prime"):
        for density in (0.1, 0.5):
            layer = MdCSR.from_dense(w, density=density, manifold=manifold)
            for batch in (1, 32, 64, 512):
                shape = (size,) if batch == 1 else (batch, size)
                x = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
                case = {"size": size, "density": density, "manifold": manifold, "batch": batch}
                yield row(case, measure(contenders(layer, x), repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the layer")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also append the rows to this file")
    arguments = parser.parse_args()
    out = arguments.out.open("a") if arguments.out else None
    with use_backend("reference"):
        for record in (environment(), *rows(arguments.size, arguments.repeats)):
            line = json.dumps(record)
            print(line, flush=True)
            if out:
                print(line, file=out, flush=True)
    if out:
        out.close()


if __name__ == "__main__":
    sys.exit(main())
