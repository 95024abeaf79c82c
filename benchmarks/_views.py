"""What tables, plots and floors read out of rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def ours(row: Row, manifold: str = "unit") -> str:
    """The contender that is our layer in the form that `pack` chooses for it."""
    return f"{manifold} {row['case']['pack'][manifold]}"


def read_bandwidth(rows: list[Row]) -> float:
    """Bytes a second that all threads together read, the median of the runs: the machine's mood changes it, too."""
    threads = most_threads(rows)
    measured = [r for r in rows if r["topic"] == "bandwidth" and r["threads"] == threads]
    return statistics.median(r["bytes per second"]["read"] for r in measured)


def bytes_per_second(row: Row, name: str) -> float | None:
    """What one product by a contender reads and writes, over its time."""
    seconds = median(row, name)
    return None if seconds is None or name not in row["bytes"] else row["bytes"][name] / seconds


class Compared(NamedTuple):
    """A figure made of several contenders' times.

    Attributes:
        value: of their medians.
        least: of all turns, in which contenders ran one after the other; None if they ran in different runs.
        greatest: likewise.
    """

    value: float
    least: float | None
    greatest: float | None


def compared(combine: Callable[..., float], *of: tuple[Row, str]) -> Compared | None:
    """Combines the seconds of contenders, each a row and a name; None where one was not measured."""
    medians = [median(row, name) for row, name in of]
    if any(seconds is None for seconds in medians):
        return None
    counts = [row["per call"].get(name, 1) for row, name in of]
    turns = [
        combine(*(seconds / count for seconds, count in zip(turn, counts, strict=True)))
        for runs in zip(*(row["runs"] for row, _ in of), strict=False)
        for turn in zip(*(run.get(name, ()) for run, (_, name) in zip(runs, of, strict=True)), strict=False)
    ]
    value = combine(*medians)
    return Compared(value, min(turns, default=value), max(turns, default=value))


def times_as_fast(row: Row, peer: str, name: str) -> Compared | None:
    """How many times as fast as a peer a contender is."""
    return compared(lambda theirs, mine: theirs / mine, (row, peer), (row, name))
