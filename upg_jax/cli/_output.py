"""What the commands share: consoles, progress bars, and JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Results go to stdout and everything said on the way to stderr, so that output can be piped.
stdout = Console()
stderr = Console(stderr=True)


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def human_bytes(count: float) -> str:
    """`1_500_000` -> `"1.5 MB"` (powers of ten, as disks and downloads are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def bytes_progress(label: str) -> Iterator[Callable[[str, int, int, str], None]]:
    """A progress bar over bytes with rate and time left, on stderr; silent where that is no terminal.

    Yields:
        A function of the stage, bytes done, bytes in all, and what is being worked on. A stage of another name
        begins a new bar.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[item]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def update(stage: str, done: int, total: int, item: str) -> None:
        if stage not in tasks:
            for task in tasks.values():
                bar.update(task, visible=False)
            tasks[stage] = bar.add_task(f"{label} {stage}", total=total, item="")
        bar.update(tasks[stage], completed=done, total=total, item=item)

    with bar:
        yield update
