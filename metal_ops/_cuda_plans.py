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
# Of an H100. A GPU with fewer takes some threadgroups after the others.
_MULTIPROCESSORS = 132
# The driver keeps 1 KiB of each resident threadgroup's shared memory.
_RESERVED = 1 << 10
# Bytes of their columns are counted in 32 bits.
_MOST_TILED_COLUMNS = 1 << 25
_LONG_ROW = 1024
# Few enough for the registers that it takes.
_TILED_THREADS = {"unit": 640, "prime": 512}
_LEVELS_SIMDGROUPS = 4
_LEVELS_TILE = 2048


@functools.lru_cache(maxsize=4096)
def stream_plan(work: Work, shared_memory: int, *, rounded: bool = False) -> Plan | None:
    """Plans a product by `sparse_matvec_stream`.

    Args:
        work: what is computed; `operation` is `"product"`.
        shared_memory: bytes that a threadgroup may have.
        rounded: whether the result is wanted in `work.dtype`. Where it has parts, they stay float32.

    Returns:
        None where not even one vector fits in shared memory.
    """
    most = 16 if work.dtype != "float32" else 8  # 32 bytes of a column
    vectors = next((v for v in (1, 2, 4, 8, 16) if v >= work.vectors), 16)
    vectors = min(vectors, most)
    tile = _tile(work, vectors, shared_memory)
    if tile == 0:
        return None
    parts = _ceil(work.columns, tile)
    memory = _memory(work, vectors, tile + (parts > 1))
    together = 2 * (sum(memory.values()) + _RESERVED) <= shared_memory + _RESERVED
    long = work.capacity >= _LONG_ROW * work.rows
    if vectors == 1 and together:
        threads, resident = (640, 2) if work.manifold == "unit" or long else (1024, 1)
    elif parts > 1:
        threads, resident = _TILED_THREADS[work.manifold], 1
    else:
        threads, resident = _fitting_threads(work.rows), 1
    words = 4 if (vectors <= 4 or (parts > 1 and work.manifold == "unit")) and long else 2
    if work.manifold == "prime" and vectors == 1 and words == 4:
        threads, resident = 640, 1  # for twice the registers
    rounded = rounded and parts == 1 and work.dtype != "float32"
    macros = {"BATCH_WORDS": words, "VECTORS": vectors}
    macros |= {name: 1 for name, wanted in (("TILED", parts > 1), ("ROUNDED", rounded)) if wanted}
    if vectors > 1 or words > 2:  # what takes few registers is compiled better without
        macros["MAX_THREADS"] = threads
    # Every threadgroup stages x: no more of them than have a row each.
    wide = _ceil(work.rows, threads // _SIMD_WIDTH)
    if parts > 1:
        wide = min(wide, max(_MULTIPROCESSORS // parts, 1))
    grid = (wide, _ceil(work.vectors, vectors) * parts, work.groups)
    step = Step(
        load_source(STREAM_KERNEL, macros),
        _host_name(STREAM_KERNEL, work),
        _names(STREAM_KERNEL),
        grid,
        (threads, 1, 1),
        memory,
        resident,
    )
    why = f"{vectors} of {work.vectors} vectors at a time, {tile} of {work.columns} columns, fit in shared memory"
    return Plan(
        work,
        (step,) if 0 not in grid else (),
        dataclasses.replace(_parameters(work), tile=tile, parts=parts),
        0,
        why,
        work.dtype if rounded else "float32",
        parts,
    )


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
        *(
            work,
            (step,) if 0 not in (*grid, work.columns) else (),
            parameters,
            0,
            "a dense product is faster",
        ),
        result=work.dtype,
    )


def _tile(work: Work, vectors: int, shared_memory: int) -> int:
    """How many columns are staged at a time: all, or a part of more vectors than one, or none at all."""
    if sum(_memory(work, vectors, work.columns).values()) <= shared_memory:
        return work.columns
    if vectors == 1 or work.columns >= _MOST_TILED_COLUMNS:
        return 0
    left = shared_memory - sum(_memory(work, vectors, 0).values())
    most = left // (_memory(work, vectors, 1024)[0] // 1024) - 1
    return _ceil(work.columns, _ceil(work.columns, most)) if most > 0 else 0


def _memory(work: Work, vectors: int, columns: int) -> dict[int, int]:
    """Threadgroup memory: columns of the vectors, as float32 when alone, and the primes."""
    size = 4 if vectors == 1 or work.dtype == "float32" else 2
    staged = columns * vectors * size
    return {0: max(staged + -staged % 16, 16), 1: _TABLE_BYTES if work.manifold == "prime" else 16}


def _fitting_threads(rows: int) -> int:
    """The number of threads whose simdgroups, one threadgroup on each multiprocessor, share the rows out best."""

    def idle(threads: int) -> float:
        at_once = _MULTIPROCESSORS * threads // _SIMD_WIDTH
        return _ceil(rows, at_once) * at_once / max(rows, 1)

    return 1024 if idle(1024) <= 1.1 * idle(768) else 768
