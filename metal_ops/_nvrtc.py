"""Compiles Metal kernels for NVIDIA GPUs with NVRTC, which needs neither a GPU nor the CUDA toolkit."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from metal_ops._build import INCLUDE
from metal_ops._errors import SourceError, UnavailableError
from metal_ops._source import Source
from metal_ops._translate import translate


def _candidates() -> list[str]:
    """The wheels of CUDA 13 and 12 first, since they are what JAX's CUDA extra brings; then the system's."""
    found: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        for pattern in ("cu1*/lib/libnvrtc.so.1*", "cuda_nvrtc/lib/libnvrtc.so.1*"):
            found += sorted(Path(folder).glob(pattern), reverse=True)
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for root in filter(None, roots):
        found += sorted(Path(root).glob("lib64/libnvrtc.so*"))
    names = [str(path) for path in found if re.fullmatch(r"libnvrtc\.so(\.\d+)*", path.name)]
    system = ctypes.util.find_library("nvrtc")
    return [*names, *([system] if system else []), "libnvrtc.so.13", "libnvrtc.so.12"]


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnavailableError(
        "compile_cuda: found no NVRTC; pip install nvidia-cuda-nvrtc-cu12, or set CUDA_HOME to a CUDA toolkit"
    )


def nvrtc_version() -> tuple[int, int]:
    """Version of NVRTC, such as `(12, 9)`.

    Raises:
        UnavailableError: NVRTC is not installed.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_cuda(source: Source, architecture: str, options: Sequence[str] = ()) -> bytes:
    """Compiles a Metal source for an NVIDIA GPU.

    Entry points have the kernels' host names. They take pointers to the buffers in order of their indices (`constant`
    references by value), then, for each piece of threadgroup memory in order, its offset in the dynamic shared memory.

    Args:
        source: what to compile.
        architecture: as in `"sm_90"`.
        options: more options for NVRTC.

    Returns:
        A cubin, for `cuModuleLoadData`.

    Raises:
        SourceError: the source breaks a rule, or NVRTC refuses it.
        UnavailableError: NVRTC is not installed.
    """
    translation = translate(source)
    library = _library()
    # Contraction to fma is within the products' bound; nothing else may be approximated.
    every = ["-default-device", "-std=c++17", f"-arch={architecture}", f"-I{INCLUDE / 'cuda'}", *options]
    program = ctypes.c_void_p()
    code = translation.cuda.encode()
    _expect(
        library,
        library.nvrtcCreateProgram(ctypes.byref(program), code, f"{source.name}.cu".encode(), 0, None, None),
    )
    try:
        arguments = (ctypes.c_char_p * len(every))(*[option.encode() for option in every])
        if library.nvrtcCompileProgram(program, len(every), arguments):
            log = _get(library, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            raise SourceError(f"{source.name}: NVRTC refuses it for {architecture}:\n{log.strip()[:4000]}")
        return _get(library, "CUBIN", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _get(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _expect(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _expect(library, getattr(library, f"nvrtcGet{what}")(program, content))
    return content.raw


def _expect(library: ctypes.CDLL, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise UnavailableError(f"compile_cuda: NVRTC fails with {library.nvrtcGetErrorString(code).decode()}")
