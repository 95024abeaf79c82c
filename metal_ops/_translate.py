"""A Metal source as C++ for the emulator, as CUDA C++, and for the check of address spaces.

Kernel bodies stay as they are, apart from attributes, which are blanked, and arrays in threadgroup memory, which
become a macro. What Metal has and C++ has not is in `include/*/metal_stdlib`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from metal_ops._errors import SourceError
from metal_ops._parse import Argument, Parsed, Signature, blank, parse
from metal_ops._source import Source

_THREADGROUP_ARRAY = re.compile(
    r"(?<=[;{}])(\s*)threadgroup\s+([\w:]+(?:<[\w\s,:]+>)?)\s+(\w+)\s*((?:\[[^\]]*\]\s*)+);"
)
_HOST_INSTANTIATION = re.compile(r"template\s*\[\[\s*host_name[^;]*;")


@dataclasses.dataclass(frozen=True)
class Translation:
    """What a Metal source becomes.

    Attributes:
        source: what was translated.
        emulator: C++17 for the emulator, to be compiled with `include/emulator` on the include path.
        cuda: CUDA C++ for NVRTC or nvcc, to be compiled with `include/cuda` on the include path.
        check: C++ in which address spaces are real, to be parsed with `include/check` on the include path.
        signatures: by host name, what every kernel takes.
    """

    source: Source
    emulator: str
    cuda: str
    check: str
    signatures: Mapping[str, Signature]


def translate(source: Source) -> Translation:
    """Translates a Metal source.

    Raises:
        SourceError: naming file, line and rule: unknown attributes, address spaces that do not fit an attribute,
            clashing indices, instantiations of an unknown form.
    """
    parsed = parse(source)
    body = _THREADGROUP_ARRAY.sub(r"\1MSL_THREADGROUP_ARRAY(\2, \3, \4);", parsed.text)
    _refuse_other_threadgroup_variables(source, body)
    return Translation(
        source, _emulator(parsed, body), _cuda(parsed, body), _check(parsed, body), parsed.signatures
    )


def _refuse_other_threadgroup_variables(source: Source, body: str) -> None:
    for m in re.finditer(r"(?<=[;{}])\s*threadgroup\s+(?!const\b)[^;*&()]*;", body):
        line = body.count("\n", 0, m.end()) + 1
        raise SourceError(
            f"{source.where(line)}: write threadgroup memory as one array: threadgroup float name[size];"
        )


def _with_lines(parsed: Parsed, body: str) -> str:
    """Adds `#line` wherever the next line comes from elsewhere."""
    out: list[str] = []
    expected = None
    for line, (file, number) in zip(body.split("\n"), parsed.source.origins, strict=False):
        if (file, number) != expected:
            out.append(f'#line {number} "{file}"')
        out.append(line)
        expected = (file, number + 1)
    return "\n".join(out)


def _without_attributes(body: str) -> str:
    return re.sub(r"\[\[.*?\]\]", lambda m: blank(m[0]), body, flags=re.DOTALL)


def _emulator(parsed: Parsed, body: str) -> str:
    body = _without_attributes(_HOST_INSTANTIATION.sub(lambda m: blank(m[0]), body))
    lines = ["#include <metal_stdlib>", _with_lines(parsed, body), '#line 1 "<launcher>"']
    entries = []
    for i, signature in enumerate(parsed.signatures.values()):
        arguments = ", ".join(_emulator_argument(n, p) for n, p in enumerate(signature.parameters))
        lines.append(
            f"static void run_{i}(const msl::Arguments& a) {{ using S = msl::Types<decltype({signature.function})>; "
            f"{signature.function}({arguments}); }}"
        )
        entries.append(f'{{"{signature.name}", run_{i}}}')
    lines.append(f"static const msl::Entry kernels[] = {{{', '.join(entries)}}};")
    lines.append("MSL_MAIN(kernels)")
    return "\n".join(lines) + "\n"


def _emulator_argument(n: int, parameter: Argument | tuple[str, str]) -> str:
    if not isinstance(parameter, Argument):
        return f"msl::attribute<S::At<{n}>>(msl::{parameter[1]}())"
    memory = "threadgroup_memory" if parameter.space == "threadgroup" else "buffers"
    return f"msl::Cast<S::At<{n}>>::from(a.{memory}[{parameter.index}])"


def _check(parsed: Parsed, body: str) -> str:
    return "#include <metal_stdlib>\n" + _without_attributes(body)


def _cuda(parsed: Parsed, body: str) -> str:
    body = _HOST_INSTANTIATION.sub(lambda m: blank(m[0]), body)
    body = re.sub(r"(?:\bkernel\b|\[\[\s*kernel\s*\]\])\s+void\b", "MSL_KERNEL void", body)
    for kernel in parsed.kernels:
        if not kernel.template:  # the entry point takes the name
            body = re.sub(rf"\b{kernel.name}\b", f"{kernel.name}_body", body)
    body = re.sub(r"\bstatic\s+inline\b", "MSL_FUNCTION", body)
    body = re.sub(r"\b(?:constexpr\s+constant|constant\s+constexpr)\b", "MSL_CONSTANT", body)
    body = re.sub(r"(?m)^constant\s+(?=\w+\s+\w+\s*(?:\[[^\]]*\]\s*)?=)", "MSL_CONSTANT ", body)
    body = re.sub(r"\bconstant\s+const\b|\bconst\s+constant\b|\bconstant\b", "const", body)
    body = re.sub(r"\b(?:device|threadgroup|thread)\b(?!\s*\()", "", body)
    lines = [
        "#include <metal_stdlib>",
        _with_lines(parsed, _without_attributes(body)),
        '#line 1 "<launcher>"',
    ]
    templates = {kernel.name for kernel in parsed.kernels if kernel.template}
    for signature in parsed.signatures.values():
        base = signature.function.split("<")[0]
        function = signature.function if base in templates else f"{base}_body"
        lines.append(_cuda_entry(signature, function, parsed.source.macros.get("MAX_THREADS")))
    return "\n".join(lines) + "\n"


def _cuda_entry(signature: Signature, function: str, max_threads: str | None) -> str:
    """Buffers in order of their indices, then the byte offsets of the pieces of threadgroup memory."""
    bounds = f"__launch_bounds__({max_threads}) " if max_threads else ""
    place = {id(p): n for n, p in enumerate(signature.parameters)}
    types = f"msl::Types<decltype({function})>"
    taken = []
    for argument in (signature.buffers()[i] for i in sorted(signature.buffers())):
        kind = f"{types}::At<{place[id(argument)]}>"
        if argument.reference and argument.space == "constant":
            taken.append(f"const __grid_constant__ msl::Value<{kind}> buffer_{argument.index}")
        else:
            taken.append(f"msl::Pointer<{kind}> __restrict__ buffer_{argument.index}")
    taken += [f"unsigned offset_{i}" for i in sorted(signature.threadgroup_memory())]
    given = []
    for n, p in enumerate(signature.parameters):
        if not isinstance(p, Argument):
            given.append(f"msl::attribute<{types}::At<{n}>>(msl::{p[1]}())")
        elif p.space == "threadgroup":
            given.append(f"({types}::At<{n}>)(msl_threadgroup_memory + offset_{p.index})")
        else:
            given.append(f"{'*' if p.reference and p.space != 'constant' else ''}buffer_{p.index}")
    shared = (
        "extern __shared__ __align__(16) char msl_threadgroup_memory[]; "
        if signature.threadgroup_memory()
        else ""
    )
    return (
        f'extern "C" __global__ void {bounds}{signature.name}({", ".join(taken)}) '
        f"{{ {shared}{function}({', '.join(given)}); }}"
    )
