"""What tables, plots and floors read out of rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks._rows import median

OURS = ("unit delta8", "unit mask", "unit dense", "prime delta8", "prime mask", "prime dense")
Row = dict[str, Any]


def of_topic(rows: list[Row], topic: str, /, **case: Any) -> Iterator[Row]:
    """The rows of a topic whose case has these values, on all threads unless `threads` says otherwise."""
    threads = case.pop("threads", most_threads(rows))
    for row in rows:
        if row["topic"] == topic and row["threads"] == threads and case.items() <= row["case"].items():
            yield row


def most_threads(rows: list[Row]) -> int | None:
    """The largest thread count among the rows."""
    return max((row["threads"] for row in rows if row["threads"]), default=None)


def ours(row: Row, manifold: str = "unit", suffix: str = "") -> str:
    """The contender that is our layer in the form that `pack` chooses for it."""
    return f"{manifold} {row['case']['pack'][manifold]}{suffix}"


def ratio(row: Row, peer: str, name: str) -> float | None:
    """How many times as fast as a peer a contender is."""
    mine, theirs = median(row, name), median(row, peer)
    return None if mine is None or theirs is None else theirs / mine


def read_bandwidth(rows: list[Row]) -> float:
    """Bytes a second that all threads together read, the median of the runs: the machine's mood changes it, too."""
    threads = most_threads(rows)
    measured = [r for r in rows if r["topic"] == "bandwidth" and r["threads"] == threads]
    return statistics.median(r["bytes per second"]["read"] for r in measured)


def bytes_per_second(row: Row, name: str) -> float | None:
    """What one product by a contender reads and writes, over its time."""
    seconds = median(row, name)
    return None if seconds is None or name not in row["bytes"] else row["bytes"][name] / seconds
