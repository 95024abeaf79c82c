"""Timing contenders in turns, and the memory's bandwidth: what `upg-jax bench` and `benchmarks/` share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Threads of another library may spin for about this long after its call; nobody is timed before they sleep.
SETTLING = 3e-3


def usable_threads() -> int:
    """How many threads can run at once in this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, budget: float = 1e9
) -> dict[str, list[float]]:
    """Times contenders in turns, so that a busy moment of the machine hits all of them.

    Before it is timed, a contender runs untimed for `SETTLING` seconds (a slow one waits), until nothing of the
    one before it is left running.

    Args:
        calls: name -> what to time; a call returns when its work is done.
        repeats: timed calls of each contender.
        budget: seconds for each contender; a slow one gets fewer repeats, at least three.

    Returns:
        Seconds of every timed call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    first = {}
    for name, call in calls.items():
        call()  # compiles, allocates, wakes
        first[name] = _time(call)
    wanted = {name: min(repeats, max(3, int(budget / (first[name] + SETTLING)))) for name in calls}
    for turn in range(max(wanted.values(), default=0)):
        for name, call in calls.items():
            if turn < wanted[name]:
                _settle(call, first[name])
                seconds[name].append(_time(call))
    return seconds


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _settle(call: Callable[[], object], expected: float) -> None:
    if expected > SETTLING:
        time.sleep(SETTLING)
        return
    begin = time.perf_counter()
    while time.perf_counter() - begin < SETTLING:
        call()


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, median, high


def bandwidth(passes: int = 8, megabytes: int = 256) -> dict[str, float]:
    """Bytes a second that all threads together read, and copy, with NumPy: the best of several passes.

    Arrays are several times larger than a cache. A copied byte counts twice, as read and as written.

    Args:
        passes: of each kind.
        megabytes: size of what is read in each pass; a copy takes twice as much memory.
    """
    threads = usable_threads()
    sources = [np.ones((megabytes << 18) // threads, np.float32) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    read = copy = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            read = min(read, _time(lambda: list(pool.map(np.max, sources))))
            copy = min(copy, _time(lambda: list(pool.map(np.copyto, targets, sources))))
    nbytes = sum(source.nbytes for source in sources)
    return {"read": nbytes / read, "copy": 2 * nbytes / copy}
