"""Metal kernels and what runs them: a checker, an emulator, and targets for Apple and NVIDIA GPUs.

Knows buffers and launches, nothing of JAX. docs/metal_ops.md explains it.
"""

from __future__ import annotations

from metal_ops._apple import Device, open_apple_device
from metal_ops._check import Problem, check
from metal_ops._cuda_kernels import compile_named, name_of
from metal_ops._cuda_plans import levels_plan, stream_plan
from metal_ops._emulator import Emulator, Program
from metal_ops._errors import KernelError, MetalError, SourceError, UnavailableError
from metal_ops._ffi import register_call
from metal_ops._ffi_types import Array, Call
from metal_ops._mdcsr import Parameters, prime_table
from metal_ops._nvrtc import compile_cuda, nvrtc_version
from metal_ops._parse import Argument, Signature
from metal_ops._plans import PRODUCT_KERNELS, Plan, Step, Work, plan
from metal_ops._self_check import check_device
from metal_ops._source import Source, load_source
from metal_ops._standin import open_emulated_device
from metal_ops._submission import Launch, Limits, Memory, Scratch
from metal_ops._translate import Translation, translate

__all__ = [
    "PRODUCT_KERNELS",
    "Argument",
    "Array",
    "Call",
    "Device",
    "Emulator",
    "KernelError",
    "Launch",
    "Limits",
    "Memory",
    "MetalError",
    "Parameters",
    "Plan",
    "Problem",
    "Program",
    "Scratch",
    "Signature",
    "Source",
    "SourceError",
    "Step",
    "Translation",
    "UnavailableError",
    "Work",
    "check",
    "check_device",
    "compile_cuda",
    "compile_named",
    "levels_plan",
    "load_source",
    "name_of",
    "nvrtc_version",
    "open_apple_device",
    "open_emulated_device",
    "plan",
    "prime_table",
    "register_call",
    "stream_plan",
    "translate",
]
