"""Finds what Apple's compiler would refuse, on any machine: address spaces first, the commonest reason of all.

Clang parses the source as C++ in which `device`, `constant` and `threadgroup` are address spaces, so that it refuses
to mix them. What is left to do here is what C++ allows and Metal does not: pointers and program-scope variables without
an address space, casts from one to another, and what the language lacks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from metal_ops._build import INCLUDE
from metal_ops._errors import SourceError, UnavailableError
from metal_ops._parse import blank, parse, without_comments
from metal_ops._source import Source
from metal_ops._translate import translate

_FILE = "source.cpp"
_THREADGROUP = 3  # of include/check/metal_stdlib
_LACKING = (
    "asm|catch|delete|double|dynamic_cast|goto|long\\s+long|new|noexcept|operator\\s+new|register|std|thread_local|"
    "throw|try|typeid|virtual|wchar_t"
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
    found = set(_lacking(source)) | {_problem(source, line, rule) for line, rule in _parsed(source, code)}
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


def _parsed(source: Source, code: str) -> Iterator[tuple[int, str]]:
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
    kernels = {kernel.name for kernel in parse(source).kernels}
    for cursor, function in _of_file(cindex, unit.cursor, None):
        for rule in _rules(cindex, cursor, function, kernels, code):
            yield cursor.location.line - 1, rule


def _of_file(cindex: Any, cursor: Any, function: Any) -> Iterator[tuple[Any, Any]]:
    """What the source declares and says, and the function that it stands in."""
    for child in cursor.get_children():
        if child.location.file is not None and child.location.file.name == _FILE:
            yield child, function
            inside = child if child.kind in _functions(cindex) else function
            yield from _of_file(cindex, child, inside)


def _functions(cindex: Any) -> tuple[Any, ...]:
    kinds = cindex.CursorKind
    return kinds.FUNCTION_DECL, kinds.FUNCTION_TEMPLATE, kinds.CXX_METHOD


def _rules(cindex: Any, cursor: Any, function: Any, kernels: set[str], code: str) -> Iterator[str]:
    kinds = cindex.CursorKind
    if cursor.kind == kinds.LAMBDA_EXPR:
        yield "Metal has no lambdas"
    if cursor.kind == kinds.CXX_BASE_SPECIFIER:
        yield "Metal has no derived classes"
    if cursor.kind == kinds.FLOATING_LITERAL and _is(cursor.type, cindex.TypeKind.DOUBLE):
        yield "a number without f is a float in Metal and a double elsewhere"
    called = cursor.referenced if cursor.kind == kinds.CALL_EXPR else None
    if called is not None and function is not None and called == function:
        yield f"{function.spelling}: Metal has no recursion"
    if cursor.kind in (kinds.PARM_DECL, kinds.VAR_DECL, kinds.FIELD_DECL):
        written = _words(code, cursor, cursor.extent.end.offset)
        if _pointee_space(cindex, cursor.type) == 0 and not {"thread", "auto"} & written:
            yield f"{cursor.spelling}: a pointer or reference needs device, constant, threadgroup or thread"
    if cursor.kind == kinds.VAR_DECL:
        yield from _rules_of_variables(cindex, cursor, function, kernels)
    if cursor.kind in _functions(cindex):
        written = _words(code, cursor, cursor.location.offset)
        if _pointee_space(cindex, cursor.result_type) == 0 and "thread" not in written:
            yield f"{cursor.spelling}: the pointer or reference that it returns needs an address space"
    if cursor.kind == kinds.CSTYLE_CAST_EXPR:
        to = _pointee_space(cindex, cursor.type)
        operand = list(cursor.get_children())[-1]
        of = _pointee_space(cindex, operand.type)
        if to is not None and of is not None and to != of:
            yield f"a cast from one address space to another: {operand.type.spelling} to {cursor.type.spelling}"


def _rules_of_variables(cindex: Any, cursor: Any, function: Any, kernels: set[str]) -> Iterator[str]:
    space = cursor.type.get_canonical().get_address_space()
    stays = function is None or cursor.storage_class == cindex.StorageClass.STATIC
    if space == _THREADGROUP and (function is None or function.spelling not in kernels):
        yield f"{cursor.spelling}: threadgroup memory is declared in kernels only"
    elif stays and space == 0:
        where = "at program scope" if function is None else "that is static"
        yield f"{cursor.spelling}: a variable {where} needs the address space constant"
    if _is(cursor.type.get_canonical(), cindex.TypeKind.VARIABLEARRAY):
        yield f"{cursor.spelling}: the length of an array must be a constant"


def _pointee_space(cindex: Any, kind: Any) -> int | None:
    """Address space that a pointer or reference points to; 0 is none, None for other types."""
    kind = kind.get_canonical()
    if not _is(kind, cindex.TypeKind.POINTER, cindex.TypeKind.LVALUEREFERENCE):
        return None
    space: int = kind.get_pointee().get_address_space()
    return space


def _is(kind: Any, *kinds: Any) -> bool:
    try:
        return kind.kind in kinds
    except ValueError:  # libclang's bindings do not know every type, e.g. _Float16
        return False


def _words(code: str, cursor: Any, end: int) -> set[str]:
    """The words of a declaration, from where it begins to `end`."""
    start = cursor.extent.start.offset
    begin = max(code.rfind(mark, 0, start) for mark in "(,;{}")
    return set(re.findall(r"\w+", code[begin + 1 : end]))
