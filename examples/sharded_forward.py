"""A feed-forward block cut over eight devices as in Megatron-LM: rows first, then columns, one sum.

    python examples/sharded_forward.py

Without eight devices, eight virtual ones on the CPU. Prints where the parts lie and what is sent.
"""

from __future__ import annotations

import os
import re

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Read once, when jax starts its CPU backend.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

import upg_jax


def main() -> None:
    rng = np.random.default_rng(0)
    up = upg_jax.MdCSR.from_dense(rng.standard_normal((1000, 256), np.float32) / 16, density=0.3)
    down = upg_jax.MdCSR.from_dense(rng.standard_normal((256, 1000), np.float32) / 32, density=0.3)
    x = rng.standard_normal((4, 256), np.float32)

    def block(x, up, down):
        return upg_jax.sparse_dense(jax.nn.silu(upg_jax.sparse_dense(x, up)), down)

    mesh = jax.make_mesh((len(jax.devices()),), ("model",))
    sharded = upg_jax.shard(up, mesh, "model"), upg_jax.shard(down, mesh, "model", dim="in")
    for name, layer in zip(("up", "down"), sharded, strict=True):
        print(f"{name:5} {layer}")
    program = jax.jit(block).lower(x, *sharded).compile()
    collectives = re.findall(r"= \S+ (all-\w+|reduce-\w+|collective-\w+)\(", program.as_text())
    print(f"a product sends: {collectives}")

    alone, together = jax.jit(block)(x, up, down), program(x, *sharded)
    print(f"largest difference from one device: {float(abs(alone - together).max()):.1e}")


if __name__ == "__main__":
    main()
