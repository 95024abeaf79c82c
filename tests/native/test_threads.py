"""The number of threads changes no bit, and no number of them deadlocks."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

# What surrounds the kernels' calls; theirs is not compiled here.
UNOPTIMIZED = "--xla_backend_optimization_level=0"

# Large enough for several items of work in every phase, and for helpers to be woken.
SCRIPT = """
import hashlib, os, sys
if sys.argv[1] != "all":
    os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import jax, numpy as np
from upg_jax import MdCSR, pack, sparse_dense, use_backend
rng = np.random.default_rng(0)
w = rng.standard_normal((900, 800)).astype(np.float32)
prime = MdCSR.from_dense(w, density=0.3, manifold="prime")
unit = MdCSR.from_dense(w, density=0.3)
layers = [prime, pack(prime, "mask"), pack(unit, "mask"), pack(unit, "dense")]
digest = hashlib.sha256()
with use_backend("native"):
    for n in (1, 3, 16, 100):
        x = rng.standard_normal((n, 800)).astype(np.float32)
        g = rng.standard_normal((n, 900)).astype(np.float32)

        @jax.jit
        def products(x, g, layers):
            # Four independent calls, which XLA may run at once.
            ys = []
            for layer in layers:
                y, vjp = jax.vjp(lambda x: sparse_dense(x, layer), x)
                ys += [y, vjp(g)[0]]
            return ys, [layer.to_dense() for layer in layers]

        for _ in range(10):
            for array in jax.tree.leaves(products(x, g, layers)):
                digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""


# Six threads of Python call at once, on four devices that share one pool, and every call wants all of its threads.
CROWD = """
import threading
import jax, numpy as np
from upg_jax import MdCSR, pack, sparse_dense, use_backend
rng = np.random.default_rng(0)
unit = MdCSR.from_dense(rng.standard_normal((700, 600)).astype(np.float32), density=0.3)
layers = [unit, pack(unit, "mask")]
x = rng.standard_normal((9, 600)).astype(np.float32)

@jax.jit
def products(x, layers):
    return [jax.vjp(lambda x: sparse_dense(x, layer), x)[1](sparse_dense(x, layer)) for layer in layers]

def bits(results):
    return b"".join(np.asarray(y).tobytes() for y in jax.tree.leaves(results))

failed = []

def calls(device):
    with use_backend("native"):
        mine = jax.device_put((x, layers), device)
        for _ in range(20):
            if bits(products(*mine)) != expected:
                failed.append(device)

with use_backend("native"):
    expected = bits(products(x, layers))
devices = jax.devices()
assert len(devices) == 4
threads = [threading.Thread(target=calls, args=(devices[i % 4],)) for i in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("different" if failed else "same")
"""


@functools.cache
def digest(pool: str, cores: str = "all") -> str:
    # NPROC is the size of XLA's CPU thread pool.
    environment = {**os.environ, "NPROC": pool, "XLA_FLAGS": UNOPTIMIZED}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, cores],
        env=environment,
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_bits_do_not_depend_on_the_number_of_threads(library):
    assert digest("1") == digest("2") == digest("7")


@pytest.mark.parametrize("pool", ["1", "2", "7"])
def test_calls_from_many_threads_on_many_devices_neither_stall_nor_mix(pool, library):
    environment = {
        **os.environ,
        "NPROC": pool,
        "XLA_FLAGS": f"{UNOPTIMIZED} --xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-c", CROWD]
    done = subprocess.run(command, env=environment, timeout=120, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "same"


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot confine a process to a core"
)
def test_one_core_gives_the_same_bits(library):
    assert digest("4", cores="1") == digest("2")
