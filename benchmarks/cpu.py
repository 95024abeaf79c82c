"""Products, decoding and call overhead on a CPU, against every peer that is installed.

    python -m benchmarks.cpu --out rows.jsonl [--quick] [--threads N] [--topics product rows ...]

Rows have every timed call of every contender in seconds; medians, ratios, tables and plots are `benchmarks.report`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import upg_jax
from benchmarks._contenders import Contenders, contenders, prepare_peers, vectors
from benchmarks._matrices import CHAIN, Matrix
from benchmarks._rows import Writer, environment
from upg_jax import MdCSR, _native, sparse_dense
from upg_jax._index import Index
from upg_jax.cli._measure import bandwidth, take_turns, usable_threads

LARGE = ((5120, 5120), (35840, 5120), (5120, 17920))
SMALL = ((576, 576), (1536, 576))
DENSITIES = (0.1, 0.5, 0.05, 0.2, 0.3, 0.7, 1.0)
CROSSINGS = (0.1, 0.15, 0.18, 0.2, 0.22, 0.25, 0.3, 0.6, 0.7, 0.8, 0.9)
BATCHES = (1, 4, 16, 64, 512)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the topics are asked for: `quick` or all of it, products by name, and how long a contender may take."""

    quick: bool
    shapes: Sequence[tuple[int, int]] | None
    densities: Sequence[float] | None
    batches: Sequence[int] | None
    repeats: int
    budget: float

    def row(self, topic: str, case: dict[str, Any], c: Contenders) -> dict[str, Any]:
        """Measures some contenders."""
        return c.row(topic, case, take_turns(c.calls, self.repeats, self.budget))


def product(run: Run) -> Iterator[dict[str, Any]]:
    """`sparse_dense` and the peers: shapes x densities x batches."""
    shapes = run.shapes or ((LARGE[0], SMALL[0]) if run.quick else LARGE + SMALL)
    densities = run.densities or (DENSITIES[:2] if run.quick else DENSITIES)
    for (rows, columns), density in itertools.product(shapes, densities):
        matrix = Matrix(rows, columns, density)
        for batch in run.batches or ((1, 16, 64) if run.quick else BATCHES):
            yield run.row("product", matrix.case(batch), contenders(matrix, batch))
            matrix.forget()


def rows(run: Run) -> Iterator[dict[str, Any]]:
    """Batch 1 by the number of rows."""
    for count in (640, 2560) if run.quick else (640, 1280, 2560, 5120, 10240, 20480):
        for density in (0.1, 0.5):
            matrix = Matrix(count, 5120, density)
            found = contenders(matrix, 1, peers=())
            yield run.row("rows", matrix.case(1), found)


def forms(run: Run) -> Iterator[dict[str, Any]]:
    """The forms of a unit layer alone, around the densities at which `pack` changes from one to another."""
    shapes = run.shapes or (LARGE[0], *SMALL)
    densities = run.densities or (CROSSINGS[3:4] if run.quick else CROSSINGS)
    for (rows, columns), density in itertools.product(shapes, densities):
        matrix = Matrix(rows, columns, density)
        for batch in run.batches or ((1,) if run.quick else (1, 4)):
            found = contenders(matrix, batch, peers=())
            found.calls = {name: call for name, call in found.calls.items() if name.startswith("unit")}
            yield run.row("forms", matrix.case(batch), found)


def transposed(run: Run) -> Iterator[dict[str, Any]]:
    """`g @ W` beside `x @ W.T`, the same layers."""
    for density in (0.1, 0.5) if run.quick else (0.1, 0.3, 0.5, 0.7, 1.0):
        matrix = Matrix(5120, 5120, density)
        for batch in (1, 16) if run.quick else BATCHES:
            found = contenders(matrix, batch, peers=())
            for name in list(found.calls):
                g = jnp.asarray(vectors(matrix, batch, rows=True))
                compiled = jax.jit(_transposed).lower(g, matrix.layers[name]).compile()
                layers = matrix.layer_stacks(name)
                found.calls[f"{name}, transposed"] = _waiting(compiled, g, layers)
            yield run.row("transposed", matrix.case(batch), found)


def _transposed(g: jax.Array, layer: MdCSR) -> jax.Array:
    shape = (*g.shape[:-1], layer.in_features)
    return jax.linear_transpose(lambda x: sparse_dense(x, layer), jnp.zeros(shape))(g)[0]


def _waiting(compiled: Callable, x: jax.Array, layers: Iterator[MdCSR]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(compiled(x, next(layers)))


def decode(run: Run) -> Iterator[dict[str, Any]]:
    """To dense: into memory that is used again (a donated buffer) and into fresh memory, beside a copy of float32."""
    for density in (0.1, 0.5) if run.quick else sorted(DENSITIES):
        matrix = Matrix(5120, 5120, density)
        source = np.asarray(matrix.decoded)
        target = np.empty_like(source)
        found = Contenders(
            calls={
                "numpy.copyto": lambda source=source, target=target: np.copyto(target, source),
                "numpy.copyto, fresh": lambda source=source: np.copyto(np.empty_like(source), source),
            }
        )
        for name, layer in matrix.layers.items():
            found.calls[name] = _decoding_into(layer, np.float32)
            found.calls[f"{name}, to bfloat16"] = _decoding_into(layer, jnp.bfloat16)
            fresh = jax.jit(lambda layer: layer.to_dense(np.float32)).lower(layer).compile()
            found.calls[f"{name}, fresh"] = lambda fresh=fresh, layer=layer: jax.block_until_ready(
                fresh(layer)
            )
            found.nbytes[name] = layer.nbytes + source.nbytes
        yield run.row("decode", matrix.case(0), found)


def _decoding_into(layer: MdCSR, dtype: Any) -> Callable[[], object]:
    """Decodes into the same memory every time: the result before is donated, and XLA reuses its buffer."""

    def run(out: jax.Array, layer: MdCSR) -> jax.Array:
        return layer.to_dense(dtype)

    out = jax.block_until_ready(layer.to_dense(dtype))
    compiled = jax.jit(run, donate_argnums=0, keep_unused=True).lower(out, layer).compile()
    held = [out]

    def call() -> None:
        held[:] = [jax.block_until_ready(compiled(held[0], layer))]

    return call


def overhead(run: Run) -> Iterator[dict[str, Any]]:
    """A small layer in a jitted chain, with entries and without: what a call costs besides its arithmetic."""
    for size, density in ((8, 0.5), (192, 0.1), (192, 0.5), (576, 0.0), (576, 0.1), (576, 0.5)):
        matrix = Matrix(size, size, density)
        found = contenders(matrix, 1, peers=())
        yield run.row("overhead", matrix.case(1), found)


def pack(run: Run) -> Iterator[dict[str, Any]]:
    """`upg_jax.pack` and `unpack` beside copies of as many bytes, and the checks of a layer."""
    for density in (0.1, 0.5):
        matrix = Matrix(5120, 5120, density)
        found = Contenders()
        layer = matrix.layers["unit delta8"]
        found.calls["validate"] = layer.validate
        found.nbytes["validate"] = layer.delta_indices.nbytes
        found.calls["validate full"] = lambda layer=layer: layer.validate("full")
        found.nbytes["validate full"] = layer.nbytes
        for form in ("mask", "dense"):
            packed = matrix.layers[f"unit {form}"]
            # A mask leaves the values where they are.
            planes = [layer.delta_indices, packed.delta_indices]
            if form == "dense":
                planes += [layer.values, packed.values]
            nbytes = sum(plane.nbytes for plane in planes)
            sources = matrix.turns(lambda n=nbytes // 2: np.ones(n, np.uint8), nbytes // 2, "bytes", nbytes)
            target = np.ones(nbytes // 2, np.uint8)
            for name, before, index in (
                (f"pack to {form}", "unit delta8", form),
                (f"unpack {form}", f"unit {form}", "delta8"),
            ):
                found.calls[name] = functools.partial(_packing, matrix.layer_stacks(before), index)
                found.calls[f"{name}, numpy.copyto"] = functools.partial(_copying, sources, target)
                found.nbytes[name] = found.nbytes[f"{name}, numpy.copyto"] = nbytes
        yield run.row("pack", matrix.case(0), found)


def _packing(layers: Iterator[MdCSR], index: Index) -> None:
    jax.block_until_ready(upg_jax.pack(next(layers), index))


def _copying(sources: Iterator[np.ndarray], target: np.ndarray) -> None:
    np.copyto(target, next(sources))


def imports(run: Run) -> Iterator[dict[str, Any]]:
    """Starting Python with jax, with upg_jax besides, and the command's help."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(*arguments: str) -> Callable[[], object]:
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, check=True, capture_output=True, env=environment)

    jax_itself = "import jax, jax.numpy, jax.extend.core, jax.interpreters.mlir"
    calls = {
        "import jax": start("-c", jax_itself),
        "import jax, upg_jax": start("-c", f"{jax_itself}, upg_jax"),
        "import jax, upg_jax and use it": start("-c", f"{jax_itself}, upg_jax; upg_jax.sparse_dense"),
        "upg-jax --help": start("-m", "upg_jax.cli", "--help"),
    }
    yield run.row("imports", {}, Contenders(calls=calls))


TOPICS = {f.__name__: f for f in (product, forms, transposed, decode, overhead, rows, pack, imports)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a few shapes, densities and batches")
    parser.add_argument("--threads", type=int, help="run on so many cores; default: all")
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--shapes", nargs="+", help="of the products, such as 5120x5120")
    parser.add_argument("--densities", nargs="+", type=float, help="of the products")
    parser.add_argument("--batches", nargs="+", type=int, help="of the products")
    parser.add_argument("--repeats", type=int, default=21, help="timed calls of each contender")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each contender of a case")
    arguments = parser.parse_args()
    if arguments.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    prepare_peers()
    library = _native.load()
    kernels = library.kernels if library else _native.unavailable_reason()
    writer = Writer(arguments.out)
    writer.write(environment(kernels=kernels, chain=CHAIN))
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or ()]
    run = Run(
        quick=arguments.quick,
        shapes=shapes,
        densities=arguments.densities,
        batches=arguments.batches,
        repeats=arguments.repeats,
        budget=arguments.budget,
    )
    for topic in arguments.topics:
        writer.write({"topic": "bandwidth", "bytes per second": bandwidth()})
        for row in TOPICS[topic](run):
            writer.write(row)
            print(f"{topic} {row['case']}", file=sys.stderr, flush=True)
    writer.write({"topic": "bandwidth", "bytes per second": bandwidth()})
    print(f"{arguments.out}: {usable_threads()} threads, {kernels}", file=sys.stderr)


if __name__ == "__main__":
    main()
