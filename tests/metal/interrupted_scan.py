"""Run as a script: Ctrl-C at random times during scans of products; prints how the scans ended, as JSON."""

import json
import os
import random
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax import MdCSR, sparse_dense, use_backend


def timed(function, x) -> float:
    begin = time.perf_counter()
    function(x).block_until_ready()
    return time.perf_counter() - begin


def main(backend: str, rounds: int, steps: int) -> None:
    size = 33
    # A permutation: every step moves each number on by one place, exactly.
    layer = MdCSR.from_dense(np.roll(np.eye(size, dtype=np.float32), 1, axis=0), density=1.0)
    layer = jax.tree.map(jnp.asarray, layer)
    layer = MdCSR(**{**vars(layer), "scales": jnp.ones(size), "values": jnp.minimum(layer.values, 1)})
    x = jnp.arange(size, dtype=jnp.float32)

    @jax.jit
    def walk(x):
        def step(carry, _):
            return sparse_dense(carry, layer), None

        return jax.lax.scan(step, x, None, length=steps)[0]

    expected = np.roll(np.arange(size), steps)
    with use_backend(backend):
        np.testing.assert_array_equal(walk(x), expected)
        seconds = min(timed(walk, x) for _ in range(3))
    counts = {"right": 0, "wrong": 0, "nan": 0, "interrupted": 0, "failed": 0, "seconds": seconds}
    rng = random.Random(7)
    for _ in range(rounds):
        # Some come before the scan begins or after it has ended.
        timer = threading.Timer(rng.uniform(0, 1.1) * seconds, os.kill, (os.getpid(), signal.SIGINT))
        try:
            with use_backend(backend):
                timer.start()
                y = np.asarray(walk(x))
                counts["nan" if np.isnan(y).any() else "right" if (y == expected).all() else "wrong"] += 1
                timer.join()
                time.sleep(0.01)
        except KeyboardInterrupt:
            counts["interrupted"] += 1
        except Exception as error:
            counts["failed" if "KeyboardInterrupt" in str(error) else "wrong"] += 1
        try:
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            counts["interrupted"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
