"""What the commands share: consoles, progress bars, and JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
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
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

# Results go to stdout and everything said on the way to stderr, so that output can be piped. Neither interprets
# what it prints: names and answers come from files. A pipe has no width; 80 columns would cut names short.
_WIDTH = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 200
stdout = Console(markup=False, emoji=False, highlight=False, width=_WIDTH)
_WIDEST = 1000
stderr = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Escapes what a terminal would act on; a bad file chooses its tensors' names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Prints a piece of an answer as it is; a terminal gets control characters, which it would act on, escaped."""
    if stdout.is_terminal:
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
    # Text would have its tabs made spaces.
    stdout.print(Segments([Segment(text)]), end="", soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table whole: where it is wider than the terminal its lines wrap, instead of words cut into columns."""
    whole = stdout.measure(table, options=stdout.options.update(max_width=_WIDEST)).maximum
    if whole <= stdout.width:
        stdout.print(table)
        return
    table.box, table.pad_edge = None, False  # what wraps has no frame
    narrow, stdout.width = stdout.width, _WIDEST
    try:
        stdout.print(table)
    finally:
        stdout.width = narrow


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on stderr; yields a function that changes the text."""
    with stderr.status(Text(printable(text))) as spinner:
        yield lambda text: spinner.update(Text(printable(text)))


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout; what JSON has no number for, such as infinity, becomes null."""
    json.dump(_finite(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", style="dim", markup=False),
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
        bar.update(tasks[stage], completed=done, total=total, item=printable(item))

    with bar:
        yield update
