"""Where the time of compiled programs goes, by XLA's profiler."""

from __future__ import annotations

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

# Events that contain others, or wait for them.
_CONTAINERS = ("ThunkExecutor", "while", "call", "cond", "conditional")


def operations(call: Callable[[], object], most: int = 12) -> dict[str, float]:
    """Seconds that the threads of XLA's CPU backend spent in operations of each kind; the rarest kinds are summed up.

    A kind is an operation's name without its number, such as `sparse_dense` or `dot`. Threads that only help a kernel
    along are not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            call()
        file = next(Path(folder).rglob("perfetto_trace.json.gz"))
        with gzip.open(file, "rt", encoding="utf-8") as f:
            trace = json.load(f)
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] == "thread_name"
    }
    kinds: collections.Counter[str] = collections.Counter()
    for event in events:
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and thread.startswith("tf_XLA"):
            kind = re.sub(r"(\.\d+)+$", "", event["name"])
            if not kind.startswith(_CONTAINERS):
                kinds[kind] += event["dur"]
    common = dict(kinds.most_common(most))
    others = sum(kinds.values()) - sum(common.values())
    return {kind: microseconds * 1e-6 for kind, microseconds in {**common, "others": others}.items()}
