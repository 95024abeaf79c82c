"""How products are launched on NVIDIA GPUs, whose threadgroups may hold all of `x`; measured on an H100.

What these plans do not cover, `plan` covers on NVIDIA, too.
"""

from __future__ import annotations

import dataclasses
import functools

from metal_ops._plans import Plan, Step, Work, _ceil, _host_name, _names, _parameters
from metal_ops._source import load_source

STREAM_KERNEL, LEVELS_KERNEL = "sparse_matvec_stream", "mdcsr_levels"

_SIMD_WIDTH = 32
_TABLE_BYTES = 4 * 10_000
# Of an H100. Another number only shifts which of two good grids is taken.
_MULTIPROCESSORS = 132
# The driver keeps 1 KiB of each resident threadgroup's shared memory.
_RESERVED = 1 << 10
_LONG_ROW = 1024
_LEVELS_SIMDGROUPS = 4
_LEVELS_TILE = 2048


@functools.lru_cache(maxsize=4096)
def stream_plan(work: Work, shared_memory: int) -> Plan | None:
    """Plans a product by `sparse_matvec_stream`.

    Args:
        work: what is computed; `operation` is `"product"`.
        shared_memory: bytes that a threadgroup may have.

    Returns:
        None where not even one vector fits in shared memory.
    """
    vectors = next((v for v in (1, 2, 4, 8, 16) if v >= work.vectors), 16)
    while vectors and sum(_memory(work, vectors).values()) > shared_memory:
        vectors //= 2
    if vectors == 0:
        return None
    memory = _memory(work, vectors)
    together = 2 * (sum(memory.values()) + _RESERVED) <= shared_memory + _RESERVED
    long = work.capacity >= _LONG_ROW * work.rows
    if vectors == 1 and together:
        threads, resident = (640, 2) if work.manifold == "unit" or long else (1024, 1)
    else:
        threads, resident = _fitting_threads(work.rows), 1
    words = 4 if vectors <= 4 and long else 2
    if work.manifold == "prime" and vectors == 1 and words == 4:
        # Twice the registers: pays where there are rows enough for fewer simdgroups.
        threads, resident, words = (
            (1024, 1, 4) if work.rows >= 3 * 32 * _MULTIPROCESSORS else (threads, resident, 2)
        )
    source = load_source(STREAM_KERNEL, {"BATCH_WORDS": words, "VECTORS": vectors})
    # Every threadgroup stages x: no more of them than have a row each.
    grid = (_ceil(work.rows, threads // _SIMD_WIDTH), _ceil(work.vectors, vectors), work.groups)
    step = Step(
        source,
        _host_name(STREAM_KERNEL, work),
        _names(STREAM_KERNEL),
        grid,
        (threads, 1, 1),
        memory,
        resident,
    )
    why = f"{vectors} of {work.vectors} vectors at a time fit in shared memory"
    return Plan(work, (step,) if 0 not in grid else (), _parameters(work), 0, why)


def levels_plan(work: Work) -> Plan:
    """Plans decoding to unscaled levels of `work.dtype`, a matrix for each of `work.groups`."""
    tile = min(_LEVELS_TILE, work.columns + work.columns % 2)
    names = {i: name for i, name in _names(LEVELS_KERNEL).items() if name not in ("x", "scales", "bias")}
    grid = (_ceil(work.rows, _LEVELS_SIMDGROUPS), 1, work.groups)
    step = Step(
        load_source(LEVELS_KERNEL), _host_name(LEVELS_KERNEL, work), names, grid,
        (_LEVELS_SIMDGROUPS * _SIMD_WIDTH, 1, 1), {0: 4 * (tile + -tile % 4) * _LEVELS_SIMDGROUPS},
    )  # fmt: skip
    parameters = dataclasses.replace(_parameters(work), tile=max(tile, 2))
    return Plan(
        work, (step,) if 0 not in (*grid, work.columns) else (), parameters, 0, "a dense product is faster"
    )


def _memory(work: Work, vectors: int) -> dict[int, int]:
    """Threadgroup memory: the vectors, as float32 when alone, and the primes."""
    size = 4 if vectors == 1 or work.dtype == "float32" else 2
    staged = work.columns * vectors * size
    return {0: max(staged + -staged % 16, 16), 1: _TABLE_BYTES if work.manifold == "prime" else 16}


def _fitting_threads(rows: int) -> int:
    """The number of threads whose simdgroups, one threadgroup on each multiprocessor, share the rows out best."""

    def idle(threads: int) -> float:
        at_once = _MULTIPROCESSORS * threads // _SIMD_WIDTH
        return _ceil(rows, at_once) * at_once / max(rows, 1)

    return 1024 if idle(1024) <= 1.1 * idle(768) else 768
