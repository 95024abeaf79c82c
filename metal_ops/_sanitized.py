"""Runs a dispatch under sanitizers, in a process of its own."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from metal_ops._build import build
from metal_ops._launch import Launch, Runner
from metal_ops._translate import Translation

_FINDING = re.compile(r"(?:runtime error: .*|ERROR: \w+Sanitizer: [\w-]+.*|WARNING: \w+Sanitizer: .*)")
_FRAME = re.compile(r"[\w./<>-]*?([\w-]+\.(?:metal|h)):(\d+)")


def sanitized(translation: Translation, sanitizers: str, options: Sequence[str]) -> Runner:
    """Compiles a translation as a program with sanitizers.

    Args:
        translation: what to run.
        sanitizers: as in `-fsanitize=`.
        options: for the compiler, besides.

    Returns:
        What `Program.dispatch` calls.
    """
    checks = (
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-DMSL_PROCESS",
    )
    program = build(
        translation.emulator, ("-O1", *checks, *options), name=translation.source.name, suffix=".sanitized"
    )
    writes = {
        name: {i for i, a in signature.buffers().items() if a.access == "read_write"}
        for name, signature in translation.signatures.items()
    }

    def run(kernel: str, launch: Launch, buffers: Mapping[int, tuple[int, int]]) -> str:
        return dispatch(program, kernel, launch, buffers, writes[kernel])

    return run


def dispatch(
    program: Path, kernel: str, launch: Launch, buffers: Mapping[int, tuple[int, int]], writes: set[int]
) -> str:
    """Runs a dispatch by a program of include/emulator/process.h; returns what went wrong."""
    name = kernel.encode()
    request = [struct.pack("=Q", len(name)), name, bytes(launch), struct.pack("=Q", len(buffers))]
    for index, (address, size) in buffers.items():
        request += [struct.pack("=QQQ", index, size, index in writes), ctypes.string_at(address, size)]
    # Fibres switch stacks, which the check for leaks does not follow.
    settings = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [program], input=b"".join(request), capture_output=True, env={**os.environ, **settings}, check=False
    )
    if done.returncode:
        return _explain(done.stderr.decode(errors="replace"), done.returncode)
    (length,) = struct.unpack_from("=Q", done.stdout)
    at = 8 + length
    for index, (address, size) in buffers.items():
        if index in writes:
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size
    return done.stdout[8 : 8 + length].decode()


def _explain(report: str, code: int) -> str:
    """A sanitizer's finding and the first line of a Metal source in its report."""
    finding, frame = _FINDING.search(report), _FRAME.search(report)
    rule = finding[0].strip() if finding else f"ended with status {code}: {report.strip()[-500:]}"
    return f"{rule} ({frame[1]}:{frame[2]})" if frame else rule
