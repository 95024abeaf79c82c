"""Finds what Apple's compiler would refuse, on any machine: address spaces first, the commonest reason of all.

Clang parses the source as C++ in which `device`, `constant` and `threadgroup` are address spaces, so that it refuses
to mix them. What is left to do here is what C++ allows and Metal does not: pointers without an address space, casts
from one to another, and what the language lacks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from metal_ops._build import INCLUDE
from metal_ops._errors import SourceError, UnavailableError
from metal_ops._parse import blank, without_comments
from metal_ops._source import Source
from metal_ops._translate import translate

_FILE = "source.cpp"
_LACKING = (
    "asm|catch|delete|double|dynamic_cast|goto|new|operator\\s+new|std|thread_local|throw|try|typeid|"
    "virtual|wchar_t"
)
_FOR_CUDA = re.compile(r"#[ \t]*if[^\n]*\b__CUDACC__\b.*?(?=#[ \t]*(?:else|elif|endif))", re.DOTALL)


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """What breaks a rule, and where."""

    file: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}"


def check(source: Source) -> list[Problem]:
    """Checks a source; an empty list means that nothing was found.

    Raises:
        UnavailableError: libclang is not installed.
    """
    try:
        code = translate(source).check
    except SourceError as error:
        place, line, rule = re.fullmatch(r"(?s)(?:([^:]*):(\d+): )?(.*)", str(error)).groups()  # type: ignore[union-attr]
        return [Problem(place or source.name, int(line or 0), rule)]
    found = set(_lacking(source)) | {_problem(source, line, rule) for line, rule in _parsed(code)}
    return sorted(found)


def _problem(source: Source, line: int, rule: str) -> Problem:
    inside = 1 <= line <= len(source.origins)
    file, number = source.origins[line - 1] if inside else (source.name, line)
    return Problem(file, number, rule)


def _lacking(source: Source) -> Iterator[Problem]:
    text = re.sub(r'"[^"\n]*"', '""', without_comments(source.text))
    text = _FOR_CUDA.sub(lambda m: blank(m[0]), text)
    for m in re.finditer(rf"\b(?:{_LACKING})\b", text):
        yield _problem(source, text.count("\n", 0, m.start()) + 1, f"Metal has no {m[0]}")


def _parsed(code: str) -> Iterator[tuple[int, str]]:
    """Lines of the source, from 1, and rules."""
    try:
        from clang import cindex
    except ImportError as error:
        raise UnavailableError('check: needs libclang; pip install "upg-jax[metal-dev]"') from error
    arguments = [
        "-std=c++14",
        "-fsyntax-only",
        "-nostdinc",
        "-nostdinc++",
        f"-I{INCLUDE / 'check'}",
        "-Wno-everything",
    ]
    unit = cindex.Index.create().parse(_FILE, args=arguments, unsaved_files=[(_FILE, code)])
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= cindex.Diagnostic.Error:
            yield diagnostic.location.line - 1, diagnostic.spelling
    for cursor in _of_file(unit.cursor):
        for rule in _rules(cindex, cursor, code):
            yield cursor.location.line - 1, rule


def _of_file(cursor: Any) -> Iterator[Any]:
    for child in cursor.get_children():
        if child.location.file is not None and child.location.file.name == _FILE:
            yield child
            yield from _of_file(child)


def _rules(cindex: Any, cursor: Any, code: str) -> Iterator[str]:
    kinds = cindex.CursorKind
    if cursor.kind == kinds.LAMBDA_EXPR:
        yield "Metal has no lambdas"
    if cursor.kind in (kinds.PARM_DECL, kinds.VAR_DECL, kinds.FIELD_DECL):
        space = _space(cindex, cursor.type)
        written = _declaration(code, cursor)
        if space == 0 and not {"thread", "auto"} & set(written):
            yield f"{cursor.spelling}: a pointer or reference needs device, constant, threadgroup or thread"
    if cursor.kind == kinds.CSTYLE_CAST_EXPR:
        to = _space(cindex, cursor.type)
        operand = list(cursor.get_children())[-1]
        of = _space(cindex, operand.type)
        if to is not None and of is not None and to != of:
            yield f"a cast from one address space to another: {operand.type.spelling} to {cursor.type.spelling}"


def _space(cindex: Any, kind: Any) -> int | None:
    """Address space that a pointer or reference points to; 0 is none, None for other types."""
    if kind.kind not in (cindex.TypeKind.POINTER, cindex.TypeKind.LVALUEREFERENCE):
        return None
    space: int = kind.get_pointee().get_address_space()
    return space


def _declaration(code: str, cursor: Any) -> list[str]:
    """The words of a declaration, from where it begins."""
    start = cursor.extent.start.offset
    begin = max(code.rfind(mark, 0, start) for mark in "(,;{}")
    return re.findall(r"\w+", code[begin + 1 : cursor.extent.end.offset])
