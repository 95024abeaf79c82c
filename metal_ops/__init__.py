"""Metal kernels and what runs them: a checker, an emulator, and targets for Apple and NVIDIA GPUs.

Knows buffers and launches, nothing of JAX. docs/metal_ops.md explains it.
"""

from __future__ import annotations

from metal_ops._check import Problem, check
from metal_ops._emulator import Emulator, Program
from metal_ops._errors import KernelError, MetalError, SourceError, UnavailableError
from metal_ops._mdcsr import Parameters, prime_table
from metal_ops._nvrtc import compile_cuda, nvrtc_version
from metal_ops._parse import Argument, Signature
from metal_ops._source import Source, load_source
from metal_ops._translate import Translation, translate

__all__ = [
    "Argument",
    "Emulator",
    "KernelError",
    "MetalError",
    "Parameters",
    "Problem",
    "Program",
    "Signature",
    "Source",
    "SourceError",
    "Translation",
    "UnavailableError",
    "check",
    "compile_cuda",
    "load_source",
    "nvrtc_version",
    "prime_table",
    "translate",
]
