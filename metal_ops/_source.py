"""Metal sources as one text: Apple's `newLibraryWithSource` knows no include paths."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from metal_ops._errors import SourceError

KERNELS = Path(__file__).parent / "kernels"
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_CONSTANT = re.compile(
    r"[ \t]*#[ \t]*define[ \t]+([A-Z][A-Z0-9_]*)[ \t]+(\d+)[uU]?[ \t]*(?://.*)?$", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One Metal source with every local include in place.

    Attributes:
        name: file name without its ending.
        text: what a Metal compiler takes.
        origins: for every line of `text`, the file and line that it came from.
        macros: what was defined ahead of the file.
    """

    name: str
    text: str
    origins: tuple[tuple[str, int], ...]
    macros: Mapping[str, str]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the text: equal texts compile to equal programs."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def constants(self) -> dict[str, int]:
        """Macros that are whole numbers, with the values they have in this source (the first definition wins)."""
        found: dict[str, int] = {}
        for name, value in _CONSTANT.findall(self.text):
            found.setdefault(name, int(value))
        return found

    def where(self, line: int) -> str:
        """`file:line` of a line of the text, counted from 1."""
        if not 1 <= line <= len(self.origins):
            return f"{self.name}:{line}"
        file, number = self.origins[line - 1]
        return f"{file}:{number}"


def load_source(name_or_path: str | os.PathLike[str], macros: Mapping[str, object] | None = None) -> Source:
    """Reads a Metal source and puts the files that it includes by `#include "x.h"` in their places.

    Args:
        name_or_path: name of a kernel file of this package such as `"sparse_matvec_simd"`, or a path.
        macros: defined ahead of the file. Kernels give their own macros defaults by `#ifndef`. On NVIDIA GPUs
            `MAX_THREADS` bounds the threads of a threadgroup, so that the compiler leaves registers for so many.

    Returns:
        The source. Each included file appears once, where it is included first.

    Raises:
        SourceError: a file does not exist, or a macro's name is none.
    """
    path = Path(name_or_path)
    if path.suffix != ".metal":
        path = KERNELS / f"{name_or_path}.metal"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in KERNELS.glob("*.metal")))
        raise SourceError(
            f"load_source: no Metal source {os.fspath(name_or_path)!r}; this package has {known}"
        )
    lines: list[str] = []
    origins: list[tuple[str, int]] = []
    defined = {name: str(value) for name, value in (macros or {}).items()}
    for i, (name, value) in enumerate(sorted(defined.items())):
        if not name.isidentifier() or "\n" in value:
            raise SourceError(f"load_source: macros map names to one line of text; got {name!r}: {value!r}")
        lines.append(f"#define {name} {value}")
        origins.append(("<macros>", i + 1))
    _append(path, lines, origins, set())
    return Source(path.stem, "\n".join(lines) + "\n", tuple(origins), defined)


def _append(path: Path, lines: list[str], origins: list[tuple[str, int]], seen: set[Path]) -> None:
    seen.add(path.resolve())
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            if line.strip() != "#pragma once":
                lines.append(line)
                origins.append((path.name, number))
            continue
        for folder in (path.parent, KERNELS):
            target = folder / include[1]
            if target.is_file():
                break
        else:
            raise SourceError(f"{path.name}:{number}: no file {include[1]!r} beside it or among the kernels")
        if target.resolve() not in seen:
            _append(target, lines, origins, seen)
