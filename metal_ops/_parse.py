"""Reads what the emulator, the CUDA target and a host need to know of a Metal source: attributes and signatures.

Only attributes on the lists below are understood; anything else is an error, since a target that overlooks an
attribute would run another program than Apple's compiler builds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

from metal_ops._errors import SourceError
from metal_ops._source import Source

Space = Literal["device", "constant", "threadgroup"]
Access = Literal["read", "read_write"]

THREAD_ATTRIBUTES = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_index_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)
_ONE_NUMBER = (
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)
_OTHER_ATTRIBUTES = ("buffer", "threadgroup", "kernel", "host_name")
_MAX_BUFFER_INDEX = 30

_ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*([^)]*?)\s*\))?\s*\]\]")
_KERNEL = re.compile(r"(?:\bkernel\b|\[\[\s*kernel\s*\]\])\s+void\s+(\w+)\s*(?=\()")
_TEMPLATE = re.compile(r"template\s*<([^<>]*)>\s*$")
_HOST = re.compile(
    r'template\s*\[\[\s*host_name\(\s*"([^"]*)"\s*\)\s*\]\]\s*(?:kernel|\[\[\s*kernel\s*\]\])\s*'
    r"(?:decltype\(\s*(\w+)\s*(<[^;()]*>)\s*\)\s*(\w+)\s*(<[^;()]*>)\s*;)?"
)


@dataclasses.dataclass(frozen=True)
class Argument:
    """A buffer or a piece of threadgroup memory that a kernel takes.

    Attributes:
        name: the parameter's.
        index: of `[[buffer(index)]]`, or of `[[threadgroup(index)]]` where `space` is `"threadgroup"`.
        space: address space.
        element: type of an element as written in Metal, template parameters resolved.
        access: `"read"` for const pointers and `constant` arguments.
        reference: True where one element is passed by reference, which `setBytes` serves.
    """

    name: str
    index: int
    space: Space
    element: str
    access: Access
    reference: bool


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a kernel takes.

    Attributes:
        name: the host name.
        function: the function as written in Metal, with template arguments.
        arguments: buffers and threadgroup memory, in order of the parameters.
        thread_attributes: attributes of the other parameters, in order.
        parameters: for every parameter in order, an `Argument` or `(type, attribute)`.
    """

    name: str
    function: str
    arguments: tuple[Argument, ...]
    thread_attributes: tuple[str, ...]
    parameters: tuple[Argument | tuple[str, str], ...]

    def buffers(self) -> dict[int, Argument]:
        """The buffers by index."""
        return {a.index: a for a in self.arguments if a.space != "threadgroup"}

    def threadgroup_memory(self) -> dict[int, Argument]:
        """The pieces of threadgroup memory by index."""
        return {a.index: a for a in self.arguments if a.space == "threadgroup"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel function of a source; a template has no host name of its own."""

    name: str
    at: int
    template: tuple[str, ...]
    parameters: tuple[Argument | tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A source without comments, its kernel functions and the signatures of what a host can call."""

    source: Source
    text: str
    kernels: tuple[Kernel, ...]
    signatures: Mapping[str, Signature]


def blank(text: str) -> str:
    """The same number of lines and columns, without content."""
    return re.sub(r"[^\n]", " ", text)


def without_comments(text: str) -> str:
    """Blanks comments; strings stay, with what looks like a comment inside them."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(lambda m: m[0] if m[0].startswith('"') else blank(m[0]), text)


def parse(source: Source) -> Parsed:
    """Reads a source.

    Raises:
        SourceError: naming file, line and rule, for what is not understood or not allowed.
    """
    text = without_comments(source.text)
    reader = _Reader(source, text)
    reader.check_attributes()
    kernels = tuple(reader.kernels())
    return Parsed(source, text, kernels, reader.signatures(kernels))


class _Reader:
    def __init__(self, source: Source, text: str) -> None:
        self.source = source
        self.text = text

    def error(self, at: int, rule: str) -> SourceError:
        return SourceError(f"{self.source.where(self.text.count(chr(10), 0, at) + 1)}: {rule}")

    def check_attributes(self) -> None:
        for m in re.finditer(r"\[\[", self.text):
            attribute = _ATTRIBUTE.match(self.text, m.start())
            if attribute is None:
                raise self.error(m.start(), "attribute not understood; write [[name]] or [[name(argument)]]")
            if attribute[1] not in (*THREAD_ATTRIBUTES, *_OTHER_ATTRIBUTES):
                raise self.error(m.start(), f"unknown attribute [[{attribute[1]}]]")

    def kernels(self) -> Iterator[Kernel]:
        seen: set[str] = set()
        for m in _KERNEL.finditer(self.text):
            name, start = m[1], m.end()
            if name in seen:
                raise self.error(m.start(), f"kernel {name} is defined twice; overloads are not supported")
            seen.add(name)
            end = self._closing(start)
            template = _TEMPLATE.search(self.text[: m.start()])
            names = tuple(part.split()[-1] for part in template[1].split(",")) if template else ()
            parameters = tuple(self._parameter(name, at, part) for at, part in self._split(start + 1, end))
            self._check_indices(name, m.start(), parameters)
            self._check_dimensions(name, m.start(), parameters)
            yield Kernel(name, m.start(), names, parameters)

    def signatures(self, kernels: tuple[Kernel, ...]) -> dict[str, Signature]:
        by_name = {kernel.name: kernel for kernel in kernels}
        found = {k.name: _signature(k.name, k.name, k, ()) for k in kernels if not k.template}
        for m in _HOST.finditer(self.text):
            host, function, arguments = m[1], m[2], m[3]
            if function is None or (function, _squeeze(arguments)) != (m[4], _squeeze(m[5])):
                raise self.error(
                    m.start(), f'host_name("{host}") must instantiate as in: decltype(f<float>) f<float>;'
                )
            if not re.fullmatch(r"[A-Za-z_]\w*", host):
                raise self.error(m.start(), f'host_name("{host}") is no identifier')
            kernel = by_name.get(function)
            if kernel is None or not kernel.template:
                raise self.error(
                    m.start(), f'host_name("{host}"): {function} is no kernel template of this source'
                )
            values = tuple(part.strip() for part in arguments[1:-1].split(","))
            if len(values) != len(kernel.template):
                raise self.error(
                    m.start(),
                    f'host_name("{host}"): {function} takes {len(kernel.template)} template arguments',
                )
            if host in found:
                raise self.error(m.start(), f'host_name("{host}") is used twice')
            found[host] = _signature(host, f"{function}<{', '.join(values)}>", kernel, values)
        if not found:
            raise SourceError(f"{self.source.name}: no kernel that a host can call")
        return found

    def _closing(self, start: int) -> int:
        depth = 0
        for i in range(start, len(self.text)):
            depth += {"(": 1, ")": -1}.get(self.text[i], 0)
            if depth == 0:
                return i
        raise self.error(start, "no closing parenthesis")

    def _split(self, start: int, end: int) -> Iterator[tuple[int, str]]:
        depth, begin = 0, start
        for i in range(start, end):
            depth += {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(self.text[i], 0)
            if self.text[i] == "," and depth == 0:
                yield begin, self.text[begin:i]
                begin = i + 1
        if self.text[begin:end].strip():
            yield begin, self.text[begin:end]

    def _parameter(self, kernel: str, at: int, part: str) -> Argument | tuple[str, str]:
        at += len(part) - len(part.lstrip())
        attribute = _ATTRIBUTE.search(part)
        if attribute is None:
            raise self.error(at, f"kernel {kernel}: parameter without an attribute: {' '.join(part.split())}")
        declaration = " ".join(part[: attribute.start()].split())
        if attribute[1] in THREAD_ATTRIBUTES:
            kind, _, name = declaration.rpartition(" ")
            if not re.fullmatch(r"u(?:int|short)[23]?", kind):
                raise self.error(
                    at, f"kernel {kernel}: {name} must be uint, ushort or a vector of them; got {kind}"
                )
            if attribute[1] in _ONE_NUMBER and kind[-1] in "23":
                raise self.error(at, f"kernel {kernel}: [[{attribute[1]}]] is one number; got {kind}")
            return kind, attribute[1]
        if attribute[1] not in ("buffer", "threadgroup"):
            raise self.error(at, f"kernel {kernel}: [[{attribute[1]}]] belongs on no parameter")
        return self._argument(kernel, at, declaration, attribute[1], attribute[2])

    def _argument(self, kernel: str, at: int, declaration: str, kind: str, index: str | None) -> Argument:
        m = re.fullmatch(
            r"(?:(const)\s)?(device|constant|threadgroup)\s(?:(const)\s)?([\w:]+(?:<[\w\s,:]+>)?)(?:\s(const))?"
            r"\s?([*&])\s?(?:const\s)?(\w+)",
            declaration,
        )
        if m is None:
            raise self.error(
                at,
                f"kernel {kernel}: {declaration}: write device, constant or threadgroup, a type, * or &, a name",
            )
        space, element, mark, name = m[2], m[4], m[6], m[7]
        if (kind == "threadgroup") != (space == "threadgroup"):
            raise self.error(at, f"kernel {kernel}: {name}: [[{kind}]] does not fit address space {space}")
        if index is None or not index.isdigit() or int(index) > _MAX_BUFFER_INDEX:
            raise self.error(
                at, f"kernel {kernel}: {name}: index must be 0 to {_MAX_BUFFER_INDEX}; got {index}"
            )
        access: Access = "read" if space == "constant" or m[1] or m[3] or m[5] else "read_write"
        return Argument(name, int(index), space, element, access, mark == "&")  # type: ignore[arg-type]

    def _check_indices(
        self, kernel: str, at: int, parameters: tuple[Argument | tuple[str, str], ...]
    ) -> None:
        taken: dict[tuple[bool, int], str] = {}
        for p in parameters:
            if isinstance(p, Argument):
                other = taken.setdefault((p.space == "threadgroup", p.index), p.name)
                if other != p.name:
                    raise self.error(at, f"kernel {kernel}: {other} and {p.name} both have index {p.index}")

    def _check_dimensions(
        self, kernel: str, at: int, parameters: tuple[Argument | tuple[str, str], ...]
    ) -> None:
        """Metal wants positions and sizes of the grid to be all numbers or all vectors of one length."""
        kinds = {
            p[1]: p[0][-1] if p[0][-1] in "23" else "1"
            for p in parameters
            if not isinstance(p, Argument) and p[1] not in _ONE_NUMBER
        }
        if len(set(kinds.values())) > 1:
            raise self.error(
                at, f"kernel {kernel}: {' and '.join(kinds)} must have the same number of components"
            )


def _squeeze(text: str) -> str:
    return re.sub(r"\s", "", text)


def _signature(host: str, function: str, kernel: Kernel, values: tuple[str, ...]) -> Signature:
    types = dict(zip(kernel.template, values, strict=True)) if values else {}
    parameters = tuple(
        dataclasses.replace(p, element=types.get(p.element, p.element)) if isinstance(p, Argument) else p
        for p in kernel.parameters
    )
    return Signature(
        name=host,
        function=function,
        arguments=tuple(p for p in parameters if isinstance(p, Argument)),
        thread_attributes=tuple(p[1] for p in parameters if not isinstance(p, Argument)),
        parameters=parameters,
    )
