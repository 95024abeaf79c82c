"""How a product with a compressed matrix is launched: which kernel, over which grid, with how much memory.

Only shapes, the number of vectors and the device's limits decide, so that a plan can be made before any data is there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, TypeAlias

from metal_ops._mdcsr import Parameters
from metal_ops._source import Source, load_source
from metal_ops._submission import Launch, Limits, Memory, Scratch

Operation: TypeAlias = Literal["product", "transposed", "decode"]

PRODUCT_KERNELS = ("sparse_matvec", "sparse_matvec_shared", "sparse_matvec_simd", "sparse_matvec_batch")
"""Kernels of this package that multiply; `plan` chooses among them."""
TRANSPOSED_KERNEL, DECODE_KERNEL = "dense_sparse", "mdcsr_decode"

# Buffer indices, the same in every kernel.
_INDICES = {
    "x": 0,
    "values": 1,
    "deltas": 2,
    "prime_table": 3,
    "prime_indices": 4,
    "scales": 5,
    "row_pointers": 6,
    "index": 7,
    "bias": 8,
    "y": 9,
}
_PARAMETERS = 10
_NOT_IN = {TRANSPOSED_KERNEL: ("bias",), DECODE_KERNEL: ("x", "index", "bias")}

_THREADS = 256
# A simdgroup takes 256 entries at a time, so that most of it would idle on a row of so few.
_SHORT_ROW = 16
# Simdgroups that fill a GPU; the largest that Apple makes runs a few thousand at once.
_TRANSPOSED_SIMDGROUPS = 512
_TRANSPOSED_ROWS = 16
_TRANSPOSED_BYTES = 32 << 20
_DECODE_SIMDGROUPS = 4
_DECODE_TILE = 1024


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be computed, without the data.

    Attributes:
        operation: `x @ W.T`, `x @ W`, or all of `W`.
        rows: of the matrix (features out).
        columns: of the matrix (features in).
        capacity: length of the planes of one layer.
        layers: in the stack.
        groups: groups of vectors, each with a layer of its own.
        vectors: of a group.
        manifold: `"unit"`, or `"prime"` with prime indices.
        dtype: of `x`: `"float32"`, `"float16"` or `"bfloat16"`.
    """

    operation: Operation
    rows: int
    columns: int
    capacity: int
    layers: int = 1
    groups: int = 1
    vectors: int = 1
    manifold: Literal["unit", "prime"] = "unit"
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Step:
    """One dispatch of a plan.

    Attributes:
        source: of the kernel.
        kernel: its host name.
        names: the buffers it takes, by index: those of `Plan.launches`, and `"sums"` for scratch memory.
        threadgroups: of the grid.
        threads: of a threadgroup.
        threadgroup_memory: bytes by index.
        resident: where not 0, at most so many threadgroups along x for each of a GPU's multiprocessors; the kernel's
            threadgroups stay and take rows in turn.
    """

    source: Source
    kernel: str
    names: Mapping[int, str]
    threadgroups: tuple[int, int, int]
    threads: tuple[int, int, int]
    threadgroup_memory: Mapping[int, int] = dataclasses.field(default_factory=dict)
    resident: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How something is launched.

    Attributes:
        work: what is computed.
        steps: dispatches, in order; none where there is nothing to compute.
        parameters: what every kernel takes.
        scratch: bytes of device memory between the steps.
        why: the reason for the kernel.
        result: dtype of `y`.
        parts: where not 1, `y` has a leading axis of so many parts, which add up to the product.
    """

    work: Work
    steps: tuple[Step, ...]
    parameters: Parameters
    scratch: int
    why: str
    result: str = "float32"
    parts: int = 1

    @functools.cached_property
    def _constants(self) -> dict[int, bytes]:
        return {_PARAMETERS: self.parameters.pack()}

    def explain(self) -> str:
        """Says in a few lines what is launched, and why."""
        if not self.steps:
            return "nothing to launch: the result is empty"
        lines = []
        for step in self.steps:
            groups, threads = (" x ".join(map(str, size)) for size in (step.threadgroups, step.threads))
            memory = sum(step.threadgroup_memory.values())
            shared = f", {memory:,} bytes of threadgroup memory each" if memory else ""
            lines.append(f"{step.kernel}: {groups} threadgroups of {threads} threads{shared}")
        lines.append(f"because {self.why}")
        if self.scratch:
            lines.append(f"with {self.scratch:,} bytes of scratch memory")
        return "\n".join(lines)

    def launches(self, memory: Mapping[str, Memory]) -> list[Launch]:
        """Binds memory.

        Args:
            memory: row-major arrays by name: `x`, `values`, `deltas`, `scales`, `row_pointers`, `index` (int32, a
                layer for each group), `y` (of dtype `result`), and on the prime manifold `prime_table` and
                `prime_indices`.
        """
        every: dict[str, Memory | Scratch] = {**memory, "sums": Scratch(self.scratch)}
        # What a kernel takes and does not read in this case must still be bound to something.
        unused = memory["scales"]
        return [
            Launch(
                step.source,
                step.kernel,
                {index: every.get(name, unused) for index, name in step.names.items()},
                self._constants,
                step.threadgroups,
                step.threads,
                step.threadgroup_memory,
            )
            for step in self.steps
        ]


@functools.lru_cache(maxsize=4096)
def plan(work: Work, limits: Limits, variant: str | None = None) -> Plan:
    """Chooses how to launch something.

    Args:
        work: what is computed.
        limits: the device's.
        variant: one of `PRODUCT_KERNELS` to use for a product instead of the one that would be chosen.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant not in (None, *PRODUCT_KERNELS):
        raise ValueError(f"plan: variant must be one of {', '.join(PRODUCT_KERNELS)}; got {variant!r}")
    if work.operation == "product":
        chosen, why = (variant, "it was asked for") if variant else _choose(work)
        return _plan_product(work, limits, chosen, why)
    if work.operation == "transposed":
        return _plan_transposed(work, limits)
    return _plan_decode(work, limits)


def _choose(work: Work) -> tuple[str, str]:
    if work.vectors > 1:
        return "sparse_matvec_batch", f"{work.vectors} vectors share the decoding of a row"
    mean = work.capacity / max(work.rows, 1)
    if mean < _SHORT_ROW:
        return "sparse_matvec", f"rows have {mean:.1f} entries on average, too few for a simdgroup"
    return (
        "sparse_matvec_simd",
        f"one vector, and rows of {mean:.0f} entries on average: a simdgroup for each",
    )


def _plan_product(work: Work, limits: Limits, variant: str, why: str) -> Plan:
    source = load_cached(variant)
    parameters = _parameters(work)
    threads = _threads(limits, _THREADS)
    simdgroups = threads // limits.simd_width
    per_group, vectors, memory = simdgroups, work.vectors, {}
    if variant == "sparse_matvec":
        per_group = threads
    elif variant == "sparse_matvec_batch":
        vectors = _ceil(vectors, source.constants["VECTORS_PER_PASS"])
    else:
        per_group *= source.constants["ROWS_PER_SIMDGROUP"]
    if variant == "sparse_matvec_shared":
        tile = max(min(work.columns, limits.threadgroup_memory // 4), 1)
        parameters = dataclasses.replace(parameters, tile=tile)
        memory = {0: 4 * tile + -4 * tile % 16}
    grid = (_ceil(work.rows, per_group), vectors, work.groups)
    step = Step(source, _host_name(variant, work), _names(variant), grid, (threads, 1, 1), memory)
    return Plan(work, (step,) if 0 not in grid else (), parameters, 0, why)


def _plan_transposed(work: Work, limits: Limits) -> Plan:
    source = load_cached(TRANSPOSED_KERNEL)
    products = max(work.groups * work.vectors, 1)
    most = min(
        _TRANSPOSED_SIMDGROUPS // products,
        work.rows // _TRANSPOSED_ROWS,
        _TRANSPOSED_BYTES // max(4 * products * work.columns, 1),
    )
    parts = max(most, 1)
    threads = _threads(limits, _THREADS)
    outer = (work.vectors, work.groups)
    grid = (_ceil(parts, threads // limits.simd_width), *outer)
    names = _names(TRANSPOSED_KERNEL)
    steps = [Step(source, _host_name(TRANSPOSED_KERNEL, work), names, grid, (threads, 1, 1))]
    if parts > 1:
        steps[0] = dataclasses.replace(steps[0], names={**names, _INDICES["y"]: "sums"})
        names = {_INDICES["x"]: "sums", _INDICES["y"]: "y"}
        grid = (_ceil(work.columns, threads), *outer)
        steps.append(Step(source, "dense_sparse_sum", names, grid, (threads, 1, 1)))
    empty = 0 in (work.columns, *outer)
    return Plan(
        work,
        () if empty else tuple(steps),
        dataclasses.replace(_parameters(work), parts=parts),
        0 if empty or parts == 1 else 4 * products * parts * work.columns,
        f"{products} vectors in {parts} parts of the rows give {products * parts} simdgroups work",
    )


def _plan_decode(work: Work, limits: Limits) -> Plan:
    source = load_cached(DECODE_KERNEL)
    threads = _threads(limits, _DECODE_SIMDGROUPS * limits.simd_width)
    simdgroups = threads // limits.simd_width
    tile = max(min(_DECODE_TILE, work.columns + -work.columns % 4), 4)
    grid = (_ceil(work.rows, simdgroups), 1, work.layers)
    step = Step(
        source, f"{DECODE_KERNEL}_{work.manifold}", _names(DECODE_KERNEL), grid, (threads, 1, 1),
        {0: 4 * tile * simdgroups},
    )  # fmt: skip
    empty = 0 in (*grid, work.columns)
    parameters = dataclasses.replace(_parameters(work), tile=tile)
    why = f"a simdgroup for each row builds {tile} columns at a time in threadgroup memory"
    return Plan(work, () if empty else (step,), parameters, 0, why)


@functools.cache
def load_cached(name: str) -> Source:
    """`load_source` of a kernel of this package, read once."""
    return load_source(name)


def _parameters(work: Work) -> Parameters:
    return Parameters(
        rows=work.rows,
        columns=work.columns,
        capacity=work.capacity,
        layers=work.layers,
        vectors=work.vectors,
        groups=work.groups,
    )


def _host_name(kernel: str, work: Work) -> str:
    return f"{kernel}_{work.manifold}_{work.dtype}"


def _names(kernel: str) -> dict[int, str]:
    missing = _NOT_IN.get(kernel, ())
    return {index: name for name, index in _INDICES.items() if name not in missing}


def _threads(limits: Limits, wanted: int) -> int:
    """A number of whole simdgroups."""
    allowed = min(wanted, limits.threads)
    return max(allowed - allowed % limits.simd_width, limits.simd_width)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
