"""Saves a jitted program with `jax.export` and runs it again, in a process that needs no code of the model.

    python examples/export.py save program.bin layer.safetensors
    python examples/export.py run program.bin layer.safetensors

The program takes the layer as an argument, so weights stay in their file. It is lowered for CPUs, NVIDIA GPUs and TPUs,
on the reference: plain StableHLO, which any of them can run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import upg_jax


def read(weights: Path) -> upg_jax.MdCSR:
    with upg_jax.UPGDecompressor.from_safetensors(weights) as file:
        return file.get_layer("layer")


def save(program: Path, weights: Path) -> None:
    dense = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    upg_jax.save(weights, {"layer": upg_jax.MdCSR.from_dense(dense, density=0.4)})
    layer = read(weights)  # planes in a file end with padding, and a program is made for one length of them

    @jax.jit
    def model(x, layer):
        return jax.nn.relu(upg_jax.sparse_dense(x, layer)).sum(-1)

    (batch,) = jax.export.symbolic_shape("batch")
    with upg_jax.use_backend("reference"):
        exported = jax.export.export(model, platforms=("cpu", "cuda", "tpu"))(
            jax.ShapeDtypeStruct((batch, 32), jnp.float32), layer
        )
    program.write_bytes(exported.serialize())
    print(f"{program}: {exported.platforms}, {program.stat().st_size:,} bytes")
    print(model(jnp.ones((2, 32)), layer))


def run(program: Path, weights: Path) -> None:
    layer = read(weights)
    # After the first use of `upg_jax.MdCSR`, which tells jax.export of the type.
    exported = jax.export.deserialize(bytearray(program.read_bytes()))
    print(exported.call(jnp.ones((2, 32)), layer))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("save", "run"):
        sys.exit(__doc__)
    {"save": save, "run": run}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
