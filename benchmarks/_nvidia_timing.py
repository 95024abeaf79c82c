"""How `benchmarks.nvidia` times products: programs of many, over copies of the matrix that exceed the L2 cache."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

CACHE = 300 << 20  # bytes that copies of a matrix take together
MOST_COPIES = 64


def copies_of(size: float) -> int:
    """How many matrices of so many bytes exceed the cache, up to what a program may have of products."""
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


def compiled(programs: dict[Any, tuple[Any, ...]]) -> dict[Any, Callable[[], Any] | Exception]:
    """Calls of jitted functions with their arguments, compiled side by side, since there are hundreds."""

    def one(function: Any, *arguments: Any) -> Callable[[], Any] | Exception:
        try:
            return functools.partial(function.lower(*arguments).compile(), *arguments)
        except Exception as error:  # of one product; the others are measured
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(lambda p: one(*p), programs.values()), strict=True))


def over_stack(f: Callable[..., jax.Array], copies: int) -> Any:
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
