"""Kernels for NVIDIA GPUs by a name that says how to make them, so that a saved program can ask for one anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
from pathlib import Path

from metal_ops._build import INCLUDE, cache_directory
from metal_ops._errors import SourceError
from metal_ops._nvrtc import compile_cuda, nvrtc_version
from metal_ops._source import KERNELS, Source, load_source
from metal_ops._translate import translate

_INSTANTIATION = re.compile(r'template\s*\[\[\s*host_name\("(\w+)"\)\s*\]\][^;]*;')


def name_of(source: Source, kernel: str) -> str:
    """The name of a kernel of this package: `"source/MACRO=1,OTHER=2/kernel"`."""
    return f"{source.name}/{','.join(f'{k}={v}' for k, v in sorted(source.macros.items()))}/{kernel}"


def compile_named(name: str, architecture: str) -> bytes:
    """Compiles the kernel of a name, or takes it from the user's cache (`METAL_OPS_CACHE`).

    Args:
        name: from `name_of`, in this process or another.
        architecture: as in `"sm_90"`.

    Returns:
        A cubin with that kernel alone.

    Raises:
        SourceError: this package has no such kernel, or NVRTC refuses it.
        UnavailableError: NVRTC is not installed.
    """
    file, macros, kernel = name.split("/")
    if not (KERNELS / f"{file}.metal").is_file():
        raise SourceError(f"compile_named: this version of metal_ops has no kernel file {file!r}")
    defined = dict(macro.split("=") for macro in macros.split(",") if macro)
    source = _only(load_source(file, defined), kernel)
    digest = hashlib.sha256(translate(source).cuda.encode())
    digest.update((INCLUDE / "cuda" / "metal_stdlib").read_bytes())
    digest.update(f"{architecture} {nvrtc_version()}".encode())
    target = cache_directory() / f"{kernel}-{digest.hexdigest()[:24]}.{architecture}.cubin"
    try:
        return target.read_bytes()
    except OSError:
        cubin = compile_cuda(source, architecture)
    _keep(cubin, target)
    return cubin


def _only(source: Source, kernel: str) -> Source:
    """The source with every other instantiation of its templates blanked: each takes a second to compile."""
    if kernel not in translate(source).signatures:
        raise SourceError(f"compile_named: {source.name}.metal has no kernel {kernel!r}")
    text = _INSTANTIATION.sub(lambda m: m[0] if m[1] == kernel else "", source.text)
    return dataclasses.replace(source, text=text)


def _keep(cubin: bytes, target: Path) -> None:
    """Writes a file of the cache, whole or not at all; a cache that cannot be written costs time and nothing else."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, target)
    except OSError:
        return
