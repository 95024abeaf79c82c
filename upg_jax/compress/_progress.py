"""How far a long operation is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["measure", "hash", "encode", "write"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """One report of a stage's progress.

    Attributes:
        stage: `"measure"` (what pruning costs, by `allocate`), `"hash"` (of the sources), `"encode"` or `"write"`.
        name: the file, tensor or block at hand.
        done: bytes done in this stage, those that an earlier run did included.
        total: bytes of this stage.
        rate: bytes a second in this run; 0.0 until it is known.
        remaining: seconds left in this stage; None until the rate is known.
    """

    stage: Stage
    name: str
    done: int
    total: int
    rate: float
    remaining: float | None


class Meter:
    """Counts the bytes of one stage and reports them."""

    def __init__(self, stage: Stage, total: int, report: Callable[[Progress], None] | None) -> None:
        self._stage: Stage = stage
        self._total = total
        self._report = report
        self._done = self._skipped = 0
        self._start = time.monotonic()

    def skip(self, nbytes: int) -> None:
        """Counts bytes that were done before, which say nothing of this run's rate."""
        self._skipped += nbytes
        self.add(nbytes, "")

    def add(self, nbytes: int, name: str) -> None:
        """Counts bytes of `name` as done."""
        self._done += nbytes
        if self._report is None:
            return
        seconds = time.monotonic() - self._start
        rate = (self._done - self._skipped) / seconds if seconds > 0 else 0.0
        remaining = (self._total - self._done) / rate if rate > 0 else None
        self._report(Progress(self._stage, name, self._done, self._total, rate, remaining))
