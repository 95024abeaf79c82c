"""The lowering on platform "cuda": XLA custom calls that launch the kernels of `metal_ops` on XLA's stream.

Everything a call needs is in its attributes, and scratch memory is one more result: a program can be saved, and XLA can
capture it in a CUDA graph. Many vectors multiply a dense matrix of levels, on tensor cores where that is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax import _cuda
from upg_jax._compat import mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _cuda_costs
from upg_jax._sparse_dense._primitive import Layout

if TYPE_CHECKING:
    import metal_ops

Algorithm: TypeAlias = Literal["auto", "sparse", "dense"]

_ELEMENTS = ("float32", "bfloat16", "float16")
# Of a grid, along its second and third axes.
_MAX_THREADGROUPS = 65_535
# Bytes of dense levels: beyond, memory counts for more than time.
_MAX_LEVELS = 2 << 30
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)


def lowering(implementation: Callable[..., jax.Array], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the lowering rule of a primitive on NVIDIA GPUs.

    Args:
        implementation: one of this module's, of the primitive's operands and `layout`.
        otherwise: the rule where the kernels are not wanted or do not fit.
    """
    lower_kernels = mlir.lower_fun(implementation, multiple_results=False)

    def lower(ctx: Any, *operands: Any, layout: Layout, backend: str, **wanted: str) -> Any:
        reason = _cuda.unavailable_reason() or _unfit(ctx.avals_in, layout)
        if reason and backend == "cuda":
            raise BackendError(f"backend 'cuda' cannot be used here: {reason}; use 'auto' or 'reference'")
        if reason or backend not in ("auto", "cuda"):
            return otherwise(ctx, *operands, layout=layout, backend=backend, **wanted)
        return lower_kernels(ctx, *operands, layout=layout, **wanted)

    return lower


def sparse_dense(
    x: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout,
    algorithm: Algorithm = "auto", dtype: str = "float32",
) -> jax.Array:  # fmt: skip
    """`x @ W.T` in float32, or rounded to x's dtype; operands as in `_primitive`."""
    return _product("product", x, scales, index, planes, layout, algorithm, dtype)


def dense_sparse(
    g: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout,
    algorithm: Algorithm = "auto",
) -> jax.Array:  # fmt: skip
    """`g @ W` in float32; operands as in `_primitive`."""
    return _product("transposed", g, scales, index, planes, layout, algorithm)


def decode(scales: jax.Array, *planes: jax.Array, layout: Layout) -> jax.Array:
    """`W` in float32, of every layer."""
    rows, columns = layout.shape
    index = jnp.arange(scales.shape[0], dtype=jnp.int32)
    work = _work("decode", jnp.zeros((scales.shape[0], 0)), index, scales, planes, layout, 0)
    if _is_nothing(work):
        return jnp.zeros((work.layers, rows, columns), jnp.float32)
    return _call(_common_plan(work), {"scales": scales}, planes, (rows, columns))


def _product(
    operation: Literal["product", "transposed"], x: jax.Array, scales: jax.Array, index: jax.Array,
    planes: Sequence[jax.Array], layout: Layout, algorithm: Algorithm, dtype: str = "float32",
) -> jax.Array:  # fmt: skip
    transposed = operation == "transposed"
    results, features = reversed(layout.shape) if transposed else layout.shape
    work = _work(operation, x, index, scales, planes, layout, features)
    shape = (*x.shape[:-1], results)
    if _is_nothing(work):
        return jnp.zeros(shape, dtype)
    flat = x.reshape(work.groups, work.vectors, features)
    if algorithm == "sparse" or (algorithm == "auto" and not dense_is_faster(work)):
        y = _walk(work, flat, {"scales": scales, "index": index}, planes, results, dtype)
    elif transposed:
        levels = _levels(work, _exact_dtype(jnp.float32, layout), index, planes)
        y = _multiply(flat.astype(jnp.float32) * _scales_of(scales, index), levels, 1)
    else:
        levels = _levels(work, _exact_dtype(x.dtype, layout), index, planes)
        y = _multiply(flat, levels, 2) * _scales_of(scales, index)
    return y.reshape(shape).astype(dtype)


def _walk(
    work: metal_ops.Work, x: jax.Array, given: dict[str, jax.Array], planes: Sequence[jax.Array], results: int,
    dtype: str,
) -> jax.Array:  # fmt: skip
    """Products by the entries; of halves of the vectors where they are more than a grid takes."""
    plan = _common_plan(work) if work.operation == "transposed" else _product_plan(work, dtype)
    if all(step.threadgroups[1] <= _MAX_THREADGROUPS for step in plan.steps):
        return _call(plan, {"x": x, **given}, planes, (results,))
    halves = jnp.array_split(x, 2, axis=1)
    works = [dataclasses.replace(work, vectors=half.shape[1]) for half in halves]
    of_half = [_walk(w, half, given, planes, results, dtype) for w, half in zip(works, halves, strict=True)]
    return jnp.concatenate(of_half, axis=1)


def _is_nothing(work: metal_ops.Work) -> bool:
    return 0 in (work.groups, work.vectors, work.rows, work.columns, work.layers, work.capacity)


def _unfit(avals: Any, layout: Layout) -> str | None:
    if layout.value_bits != 8:
        return f"values of {layout.value_bits} bits have no kernel for NVIDIA GPUs"
    if layout.index != "delta8":
        return f"index {layout.index!r} has no kernel for NVIDIA GPUs; upg_jax.unpack makes it 'delta8'"
    if str(avals[0].dtype) not in _ELEMENTS:
        return f"x is {avals[0].dtype}"
    if not all(isinstance(n, int) for aval in avals for n in aval.shape):
        return "shapes are symbolic"
    if math.prod(avals[0].shape) >= 2**32:
        return "x has 2**32 or more elements"
    groups = (
        avals[0].shape[0] if len(avals) < 6 and avals[1].dtype == jnp.uint32 else math.prod(avals[2].shape)
    )
    return "a grid has at most 65535 groups" if groups > _MAX_THREADGROUPS else None


def _work(
    operation: Any, x: jax.Array, index: jax.Array, scales: jax.Array, planes: Sequence[jax.Array], layout: Layout,
    features: int,
) -> metal_ops.Work:  # fmt: skip
    import metal_ops

    return metal_ops.Work(
        operation=operation,
        rows=layout.shape[0],
        columns=layout.shape[1],
        capacity=planes[1].shape[-1],
        layers=scales.shape[0],
        groups=math.prod(index.shape),
        vectors=math.prod(x.shape[index.ndim : -1]) if features else 1,
        manifold=layout.manifold,
        dtype=str(x.dtype),
    )


def dense_is_faster(work: metal_ops.Work) -> bool:
    """Whether `auto` multiplies dense levels."""
    # With bfloat16 vectors prime levels are in memory as float32 and as three bfloat16 parts.
    level_bytes = 2 if work.manifold == "unit" else 10 if work.dtype == "bfloat16" else 4
    if work.groups * work.rows * work.columns * level_bytes > _MAX_LEVELS:
        return False
    if work.operation == "transposed":
        return work.groups <= work.layers  # else some layers would be decoded again, mostly for few vectors
    plan = _product_plan(work, "float32")
    if _cuda_costs.passes(plan) == 1:
        return False
    kind = _cuda_costs.kind_of(work)
    dense = _cuda_costs.levels_microseconds(work, _cuda_costs.LEVELS[kind])
    return dense < _cuda_costs.walk_microseconds(work, plan, _cuda_costs.WALK[kind])


def _exact_dtype(x: Any, layout: Layout) -> Any:
    """What holds every level exactly, to multiply with x: 8 bits on the unit manifold, 24 on the prime one."""
    if layout.manifold == "prime":
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16") if x == jnp.float32 else x


def _product_plan(work: metal_ops.Work, dtype: str) -> metal_ops.Plan:
    import metal_ops

    plan = metal_ops.stream_plan(work, _cuda.shared_memory(), rounded=dtype == work.dtype)
    return plan or _common_plan(work)


def _common_plan(work: metal_ops.Work) -> metal_ops.Plan:
    import metal_ops

    return metal_ops.plan(work, metal_ops.Limits(threads=1024, simd_width=32, threadgroup_memory=48 << 10))


def _levels(work: metal_ops.Work, dtype: Any, index: jax.Array, planes: Sequence[jax.Array]) -> jax.Array:
    """Dense levels `(groups, rows, columns)` of the layer of each group."""
    import metal_ops

    plan = metal_ops.levels_plan(dataclasses.replace(work, operation="decode", dtype=str(dtype)))
    return _call(plan, {"index": index}, planes, (work.rows, work.columns))


def _multiply(x: jax.Array, levels: jax.Array, contracted: int) -> jax.Array:
    """A product for each group, accumulated in float32; of float32 and bfloat16, the former as three bfloat16 ones."""
    if x.dtype == jnp.bfloat16 and levels.dtype == jnp.float32:
        # Levels are integers below 2**24. (float16 vectors have no such partner: its largest is 65504.)
        three = jnp.stack(_three_parts(levels), axis=1)
        dimensions = (((2,), (contracted + 1,)), ((0,), (0,)))
        return lax.dot_general(x, three, dimensions, preferred_element_type=jnp.float32).sum(axis=2)
    exact = x.dtype == levels.dtype or levels.dtype == jnp.float32
    parts = [x.astype(levels.dtype)] if exact else _three_parts(x)
    dimensions = (((2,), (contracted,)), ((0,), (0,)))
    precision = lax.Precision.HIGHEST if levels.dtype == jnp.float32 else None
    y = lax.dot_general(
        *(jnp.concatenate(parts, axis=1), levels, dimensions),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(y.shape[0], len(parts), -1, y.shape[-1]).sum(axis=1)


def _three_parts(x: jax.Array) -> list[jax.Array]:
    """The smallest first, of 8 bits each: their sum is `x`."""
    parts: list[jax.Array] = []
    for _ in range(3):
        # The largest float32 would round to infinity.
        part = jnp.clip(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7), -_LARGEST, _LARGEST)
        parts.insert(0, part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _scales_of(scales: jax.Array, index: jax.Array) -> jax.Array:
    chosen = jnp.clip(index.reshape(-1), 0, scales.shape[0] - 1)
    return jnp.take(scales, chosen, axis=0)[:, None, :]


def _call(
    plan: metal_ops.Plan, given: dict[str, jax.Array], planes: Sequence[jax.Array], features: tuple[int, ...]
) -> jax.Array:  # fmt: skip
    """Launches a plan's steps; the result is `(groups, [vectors,] *features)`."""
    import metal_ops

    work = plan.work
    arrays = {
        **given,
        **dict(zip(("row_pointers", "values", "deltas", "prime_indices"), planes, strict=False)),
    }
    if work.manifold == "prime":
        arrays["prime_table"] = jnp.asarray(metal_ops.prime_table())
    outer = (work.groups,) if work.operation == "decode" else (work.groups, work.vectors)
    parts = (plan.parts,) if plan.parts > 1 else ()
    result = jax.ShapeDtypeStruct((*parts, *outer, *features), plan.result)
    parameters = np.frombuffer(plan.parameters.pack(), np.int32)
    for step in plan.steps:
        to = {**step.names}.get(9, "y")
        out = result if to == "y" else jax.ShapeDtypeStruct((plan.scratch // 4,), jnp.float32)
        # What a kernel takes and does not read in this case is bound to a plane.
        taken = [name for i, name in sorted(step.names.items()) if i != 9]
        operands = {name: arrays.get(name, arrays["values"]) for name in taken}
        places = {name: i for i, name in enumerate(operands)}
        memory = [size for _, size in sorted(step.threadgroup_memory.items())]
        arrays[to] = jax.ffi.ffi_call(_cuda.LAUNCH, out)(
            *operands.values(),
            kernel=metal_ops.name_of(step.source, step.kernel),
            buffers=np.array([*(places[name] for name in taken), len(operands)], np.int32),
            parameters=parameters,
            shared_memory=np.cumsum([0, *memory]).astype(np.int32),
            grid=np.array(step.threadgroups, np.int32),
            threads=np.int32(step.threads[0]),
            resident=np.int32(step.resident),
        )
    return arrays["y"].sum(axis=0) if parts else arrays["y"]
