"""Runs Metal kernels on a CPU, with the rules of the hardware enforced."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from metal_ops._build import build, compiler, identity
from metal_ops._errors import KernelError
from metal_ops._launch import Launch, Runner
from metal_ops._parse import Signature
from metal_ops._sanitized import sanitized
from metal_ops._source import Source
from metal_ops._translate import translate

Buffer: TypeAlias = "tuple[int, int] | bytes | np.ndarray"

_MAX_THREADS = 1024
# Kernels read planes by vector pointers; -fwrapv and signed characters are what GPUs have.
_OPTIONS = ("-fno-strict-aliasing", "-fsigned-char", "-fwrapv", "-ffp-contract=off", "-pthread", "-w")


class Program:
    """A compiled source; `Emulator.compile` makes it.

    Attributes:
        signatures: by host name, what every kernel takes.
    """

    def __init__(
        self, signatures: Mapping[str, Signature], runner: Runner, *, reverse: bool, threads: int, memory: int
    ) -> None:
        self.signatures = signatures
        self._memory = memory
        self._runner = runner
        self._reverse = reverse
        self._threads = threads

    def dispatch(
        self,
        kernel: str,
        buffers: Mapping[int, Buffer],
        *,
        threadgroups: Sequence[int],
        threads_per_threadgroup: Sequence[int],
        threadgroup_memory: Mapping[int, int] | None = None,
    ) -> None:
        """Runs a kernel to its end.

        Args:
            kernel: its host name.
            buffers: by buffer index: an address and a number of bytes, bytes (read only), or a contiguous array.
                Every buffer of the signature must be there.
            threadgroups: how many threadgroups, `(x, y, z)`.
            threads_per_threadgroup: how many threads in each, `(x, y, z)`; at most 1024.
            threadgroup_memory: bytes by index, multiples of 16; full of NaN when a threadgroup begins.

        Raises:
            KernelError: naming kernel and rule, when the dispatch does not fit the signature or the kernel breaks a
                rule: a simdgroup operation in divergent control flow, a barrier that not every thread reaches, too
                much threadgroup memory, and in sanitized programs whatever the sanitizers find. What the kernel wrote
                until then stays.
        """
        signature = self.signatures.get(kernel)
        if signature is None:
            raise KernelError(f"{kernel}: no such kernel; this program has {', '.join(self.signatures)}")
        memory = dict(threadgroup_memory or {})
        places = {i: _place(kernel, signature, i, buffer) for i, buffer in buffers.items()}
        _check(signature, places, memory, threadgroups, threads_per_threadgroup, self._memory)
        if 0 in threadgroups:
            return
        launch = Launch(os_threads=self._threads, reverse=self._reverse)
        launch.groups[:] = list(threadgroups)
        launch.threads[:] = list(threads_per_threadgroup)
        for i, (address, _) in places.items():
            launch.buffers[i] = address
        for i, size in memory.items():
            launch.threadgroup_memory[i] = size
        rule = self._runner(kernel, launch, places)
        if rule:
            raise KernelError(f"{kernel}: {rule}")


class Emulator:
    """Compiles Metal sources for this machine's processor.

    Args:
        sanitize: `None`, or sanitizers as compilers name them, such as `"address,undefined"`. A sanitized program
            runs each dispatch in a process of its own, with buffers of exactly the given sizes, so that an access
            outside a buffer or by a misaligned vector pointer ends in a `KernelError` naming the line.
        order: order in which lanes, simdgroups and threadgroups run where nothing orders them. A correct kernel gives
            the same result in both.
        threads: processor threads that share the threadgroups of a dispatch.
        threadgroup_memory: bytes that a threadgroup may have; Apple's GPUs have 32 KiB.
    """

    def __init__(
        self,
        sanitize: str | None = None,
        order: Literal["forward", "reverse"] = "forward",
        threads: int | None = None,
        threadgroup_memory: int = 32 << 10,
    ) -> None:
        if order not in ("forward", "reverse"):
            raise ValueError(f'Emulator: order is "forward" or "reverse"; got {order!r}')
        self._sanitize = sanitize
        self._reverse = order == "reverse"
        self._threads = 1 if threads is None else threads
        self._memory = threadgroup_memory

    def compile(self, source: Source) -> Program:
        """Translates and compiles a source; a compiled one is kept in the user's cache (`METAL_OPS_CACHE`).

        Raises:
            SourceError: the source breaks a rule, or does not compile.
            UnavailableError: there is no C++ compiler.
        """
        translation = translate(source)
        if self._sanitize is None:
            runner = _library(translation.emulator, source.name)
        else:
            runner = sanitized(translation, self._sanitize, _OPTIONS)
        return Program(
            translation.signatures, runner, reverse=self._reverse, threads=self._threads, memory=self._memory
        )


def _library(code: str, name: str) -> Runner:
    # Symbols that the linker makes unique across libraries would mix up two programs in one process.
    unique = () if "clang" in identity(compiler()) else ("-fno-gnu-unique",)
    options = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden", *unique, *_OPTIONS)
    call = ctypes.CDLL(str(build(code, options, name=name, suffix=".so"))).metal_ops_launch
    call.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)

    def run(kernel: str, launch: Launch, buffers: Mapping[int, tuple[int, int]]) -> str:
        message = ctypes.create_string_buffer(1000)
        call(kernel.encode(), ctypes.byref(launch), message, len(message))
        return message.value.decode()

    return run


def _place(kernel: str, signature: Signature, index: int, buffer: Buffer) -> tuple[int, int]:
    """Address and size of a buffer, which the caller keeps alive."""
    argument = signature.buffers().get(index)
    if argument is None:
        raise KernelError(f"{kernel}: takes no buffer {index}; it takes {sorted(signature.buffers())}")
    writes = argument.access == "read_write"
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous or (writes and not buffer.flags.writeable):
            raise KernelError(
                f"{kernel}: buffer {index} ({argument.name}) must be contiguous{' and writeable' * writes}"
            )
        return buffer.ctypes.data, buffer.nbytes
    if isinstance(buffer, bytes):
        if writes:
            raise KernelError(f"{kernel}: buffer {index} ({argument.name}) is written, so it cannot be bytes")
        # The address of a bytes object's content; `buffers` keeps the object alive.
        return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0, len(buffer)
    return buffer


def _check(
    signature: Signature,
    buffers: Mapping[int, tuple[int, int]],
    memory: Mapping[int, int],
    groups: Sequence[int],
    threads: Sequence[int],
    limit: int,
) -> None:
    kernel = signature.name
    for index, argument in signature.buffers().items():
        if index not in buffers:
            raise KernelError(f"{kernel}: buffer {index} ({argument.name}) is not bound")
    if set(memory) != set(signature.threadgroup_memory()):
        raise KernelError(
            f"{kernel}: takes threadgroup memory {sorted(signature.threadgroup_memory())}; got {sorted(memory)}"
        )
    if any(size <= 0 or size % 16 for size in memory.values()) or sum(memory.values()) > limit:
        raise KernelError(
            f"{kernel}: threadgroup memory must be positive multiples of 16 bytes, at most {limit} "
            f"together; got {dict(memory)}"
        )
    if len(groups) != 3 or len(threads) != 3 or min(groups) < 0 or max(groups) >= 2**32 or min(threads) < 1:
        raise KernelError(f"{kernel}: grids are (x, y, z), threads at least 1; got {groups} and {threads}")
    if math.prod(threads) > _MAX_THREADS:
        raise KernelError(
            f"{kernel}: at most {_MAX_THREADS} threads per threadgroup; got {math.prod(threads)}"
        )
