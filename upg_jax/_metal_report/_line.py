"""Lines of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        section: what it belongs to.
        name: what was tried.
        ok: whether it worked.
        found: the result, or the error.
    """

    section: str
    name: str
    ok: bool
    found: str


def attempt(section: str, name: str, work: Callable[[], str]) -> Line:
    """Does something that says what it found, or raises."""
    try:
        return Line(section, name, True, work())
    except Exception as error:
        return Line(section, name, False, f"{type(error).__name__}: {error}")


def as_text(lines: Sequence[Line]) -> str:
    """The report as a block to paste into an issue."""
    width = max(len(line.name) for line in lines)
    text, section = ["```text"], ""
    for line in lines:
        if line.section != section:
            section = line.section
            text.append(f"[{section}]")
        text.append(f"{'ok  ' if line.ok else 'FAIL'} {line.name:<{width}}  {line.found}")
    failed = sum(not line.ok for line in lines)
    text.append(f"{failed} of {len(lines)} failed" if failed else f"all {len(lines)} ok")
    return "\n".join([*text, "```"])
