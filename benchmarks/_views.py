"""What tables, plots and floors read out of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks._rows import median

OURS = ("unit delta8", "unit packed", "prime delta8", "prime packed")
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


def best(row: Row, names: tuple[str, ...] = OURS[:2]) -> tuple[str, float] | None:
    """The fastest of some contenders, by default of the unit manifold's encodings, and its seconds."""
    found = [(seconds, name) for name in names if (seconds := median(row, name)) is not None]
    return min(found)[::-1] if found else None


def ratio(row: Row, peer: str, names: tuple[str, ...] = OURS[:2]) -> float | None:
    """How many times as fast as a peer the best of ours is."""
    ours, theirs = best(row, names), median(row, peer)
    return None if ours is None or theirs is None else theirs / ours[1]


def read_bandwidth(rows: list[Row]) -> float:
    """Bytes a second that all threads together read, the best seen in the run."""
    threads = most_threads(rows)
    measured = [r for r in rows if r["topic"] == "bandwidth" and r["threads"] == threads]
    return max(r["bytes per second"]["read"] for r in measured)


def bytes_per_second(row: Row, name: str) -> float | None:
    """What one product by a contender reads and writes, over its time."""
    seconds = median(row, name)
    return None if seconds is None or name not in row["bytes"] else row["bytes"][name] / seconds
