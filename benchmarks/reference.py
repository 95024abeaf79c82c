"""The reference lowering of `sparse_dense` against BCSR, XLA's dense product and one decode to dense.

    python -m benchmarks.reference --out rows.jsonl [--size 5120]

It should be at least 1.5 times as fast as BCSR for one vector, and from 32 vectors on take at most three times the
dense product plus one decode; `benchmarks.floors` tells from the rows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._contenders import contenders
from benchmarks._matrices import Matrix
from benchmarks._rows import Writer, environment
from upg_jax import use_backend
from upg_jax.cli._measure import take_turns


def rows(size: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Densities x batches, both manifolds."""
    for density, batch in itertools.product((0.1, 0.5), (1, 32, 64, 512)):
        matrix = Matrix(size, size, density)
        found = contenders(matrix, batch, peers=("XLA dense float32", *(["BCSR"] if batch == 1 else [])))
        for name in [name for name in matrix.layers if not name.endswith("delta8")]:
            del found.calls[name]
            found.per_call.pop(name, None)
        for name in [name for name in matrix.layers if name.endswith("delta8")]:
            layer = matrix.layers[name]
            decode = jax.jit(lambda layer: layer.to_dense(jnp.float32)).lower(layer).compile()
            found.calls[f"{name} decode"] = lambda decode=decode, layer=layer: jax.block_until_ready(
                decode(layer)
            )
        renamed = {
            name: name.replace("delta8 decode", "decode").replace("delta8", "reference")
            for name in found.calls
        }
        found.calls = {renamed[name]: call for name, call in found.calls.items()}
        found.per_call = {renamed[name]: count for name, count in found.per_call.items()}
        yield found.row("reference", matrix.case(batch), take_turns(found.calls, repeats, budget=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the layer")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    writer = Writer(arguments.out)
    with use_backend("reference"):
        writer.write(environment(kernels="the reference"))
        for row in rows(arguments.size, arguments.repeats):
            writer.write(row)
            print(f"reference {row['case']}", flush=True)


if __name__ == "__main__":
    main()
