"""Plans for NVIDIA GPUs against what the GPU has: registers, and the measured times that `auto` rests on."""

from __future__ import annotations

import itertools
import statistics
import struct
from pathlib import Path

import pytest

import metal_ops
from benchmarks.nvidia_auto import products

ROWS = Path(__file__).parents[2] / "docs" / "results" / "2026-11-23-h100-batches.jsonl.gz"
# Of a multiprocessor, since compute capability 3.5; they are handed out by 8 a thread.
REGISTERS = 65_536
# Tags of a cubin's section .nv.info: a value of two words, the kernel's number and its registers.
_WORDS, _REGISTER_COUNT = 0x04, 0x2F


def sections(elf: bytes) -> dict[str, bytes]:
    """Contents by name of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    table = [struct.unpack_from("<2I4Q", elf, start + i * size) for i in range(count)]
    strings = table[names][4]
    return {
        elf[strings + name : elf.index(b"\0", strings + name)].decode(): elf[offset : offset + length]
        for name, _, _, _, offset, length in table
    }


def registers(cubin: bytes) -> list[int]:
    """Of each thread, for each kernel."""
    info, found, at = sections(cubin)[".nv.info"], [], 0
    while at < len(info):
        form, tag, size = struct.unpack_from("<2BH", info, at)
        if (form, tag) == (_WORDS, _REGISTER_COUNT):
            found.append(struct.unpack_from("<2I", info, at + 4)[1])
        at += 4 + (size if form == _WORDS else 0)
    return found


def stream_steps() -> dict[str, int]:
    """What kernels products of Phi-4's and small shapes name, with the most threads that each is launched with."""
    threads: dict[str, int] = {}
    shapes = [(35840, 5120), (5120, 17920), (1536, 1536), (300, 40)]
    for (rows, columns), density, vectors, manifold, dtype in itertools.product(
        shapes, (0.05, 0.5), (1, 2, 4, 8, 16), ("unit", "prime"), ("bfloat16", "float32")
    ):
        work = metal_ops.Work(
            operation="product", rows=rows, columns=columns, capacity=int(rows * columns * density), layers=1,
            groups=1, vectors=vectors, manifold=manifold, dtype=dtype,
        )  # fmt: skip
        for rounded in (False, True):
            plan = metal_ops.stream_plan(work, 227 << 10, rounded=rounded)
            for step in plan.steps if plan else ():
                name = metal_ops.name_of(step.source, step.kernel)
                threads[name] = max(threads.get(name, 0), step.threads[0])
    return threads


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_no_kernel_needs_more_registers_than_its_threads_have(architecture, tmp_path, monkeypatch):
    """NVRTC knows nothing of a launch: without bounds it may take registers that no block of 1024 threads has."""
    try:
        metal_ops.nvrtc_version()
    except metal_ops.UnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("METAL_OPS_CACHE", str(tmp_path))
    seen = {}
    for name, threads in stream_steps().items():
        cubin = metal_ops.compile_named(name, architecture)
        counts = registers(cubin)
        assert counts
        seen[name] = (max(counts), threads)
    over = {name: found for name, found in seen.items() if found[0] * found[1] > REGISTERS}
    assert not over


def test_auto_takes_the_faster_way_of_the_products_that_were_measured():
    losses = [max(p.loss, 1.0) for p in products([ROWS])]
    assert len(losses) > 200
    assert statistics.geometric_mean(losses) < 1.01
    assert max(losses) < 1.4  # dense float32 products, whose time is no line
