"""The kernels for NVIDIA GPUs in the emulator: products that stay on a multiprocessor, and dense levels."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from helpers import metal
from helpers.bounds import assert_within_bound
from helpers.layers import Case
from oracle import mdcsr as oracle

import metal_ops
import upg_jax

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CASES = [
    Case("random", (33, 67)),
    Case("empty_rows", (33, 67), "prime"),
    Case("last_column", (13, 300)),
    Case("full", (5, 1030)),
    Case("full", (5, 700), "prime", row_alignment=8),
    Case("zero", (7, 67)),
]


def launch(
    plan: metal_ops.Plan, planes: metal.Planes, result: np.ndarray, more: dict, **settings
) -> np.ndarray:
    (step,) = plan.steps
    program = metal_ops.Emulator(threadgroup_memory=227 << 10, **settings).compile(step.source)
    buffers = {**planes.buffers(), 8: planes.scales, 9: result, 10: plan.parameters.pack(), **more}
    x, *others = step.threadgroups
    program.dispatch(
        step.kernel,
        {i: b for i, b in buffers.items() if i in (*step.names, 10)},
        # A GPU runs few at once, so that they take rows in turn.
        threadgroups=(min(x, 2) if step.resident else x, *others),
        threads_per_threadgroup=(64, 1, 1) if step.resident else step.threads,
        threadgroup_memory=step.threadgroup_memory,
    )
    return result


def product(
    planes: metal.Planes, x: np.ndarray, index, *, memory=227 << 10, rounded=False, **settings
) -> np.ndarray:
    groups, vectors, columns = x.shape
    work = metal_ops.Work(
        operation="product", rows=planes.shape[0], columns=columns, capacity=planes.values.shape[1],
        layers=len(planes.values), groups=groups, vectors=vectors, manifold=planes.manifold, dtype=x.dtype.name,
    )  # fmt: skip
    plan = metal_ops.stream_plan(work, memory, rounded=rounded)
    shape = (plan.parts, groups, vectors, planes.shape[0])
    y = metal.aligned(np.full(shape, np.nan, DTYPES[plan.result]))
    raw = y.view(np.uint16) if y.dtype.name == "bfloat16" else y
    launch(plan, planes, raw, {0: metal.bits(x), 7: np.asarray(index, np.int32)}, **settings)
    return y[0] if plan.parts == 1 else y.sum(axis=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", [1, 3, 17])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_the_oracle(case, vectors, dtype, rng):
    planes = metal.Planes.of(case.layer)
    x = rng.standard_normal((1, vectors, planes.shape[1])).astype(DTYPES[dtype])
    y = product(planes, x, [0])
    w = np.asarray(oracle.decode_layer(case.layer), np.float64)
    assert_within_bound(y[0], lambda x, w: x @ w.T, x[0], w, terms=planes.shape[1] + 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_rounded_results_are_the_float32_ones_rounded_once(vectors, dtype, rng):
    planes = metal.Planes.of(CASES[0].layer)
    x = rng.standard_normal((1, vectors, planes.shape[1])).astype(DTYPES[dtype])
    x[0, 1:2] *= np.finfo(dtype).max / 200 if dtype == "float16" else 1e36  # some overflow when rounded
    x[0, 2:3, 5] = np.nan
    exact, rounded = (product(planes, x, [0], rounded=wanted) for wanted in (False, True))
    assert rounded.dtype == x.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        expected = exact.astype(x.dtype)
    np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vectors", "columns"), [(2, 1), (3, 5), (17, 30)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_of_columns_add_up_to_the_product(case, vectors, columns, dtype, rng):
    planes = metal.Planes.of(case.layer)
    x = rng.standard_normal((1, vectors, planes.shape[1])).astype(DTYPES[dtype])
    at_once = (
        {2: 2, 3: 4, 17: 32 // x.itemsize}[vectors] if dtype != "float32" else min(vectors + vectors % 2, 8)
    )
    memory = 48 + (columns + 1) * at_once * x.itemsize
    memory += 40_000 if planes.manifold == "prime" else 0
    y = product(planes, x, [0], memory=memory, rounded=True)
    assert y.dtype == np.float32
    w = np.asarray(oracle.decode_layer(case.layer), np.float64)
    assert_within_bound(y[0], lambda x, w: x @ w.T, x[0], w, terms=planes.shape[1] + 2)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_groups_name_their_layers_and_no_order_of_lanes_matters(order, rng):
    layers = [Case("random", (9, 67), "prime", seed=seed).layer for seed in range(3)]
    planes = metal.Planes.of(upg_jax.stack(layers))
    x = rng.standard_normal((4, 2, 67)).astype(np.float32)
    y = product(planes, x, [2, 0, 9, -4], order=order)
    for g, layer in enumerate([2, 0, 2, 0]):
        w = np.asarray(oracle.decode_layer(layers[layer]), np.float64)
        assert_within_bound(y[g], lambda x, w: x @ w.T, x[g], w, terms=69)


@pytest.mark.parametrize("sanitize", [None, pytest.param("address,undefined", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
)
@pytest.mark.parametrize(("vectors", "memory"), [(1, 227 << 10), (5, 227 << 10), (5, 43_000)])
@pytest.mark.parametrize("manifold", metal.MANIFOLDS)
def test_planes_of_any_content_stay_inside_the_buffers(manifold, vectors, memory, seed, sanitize):
    rng = np.random.default_rng(seed)
    rows, columns, capacity = 9, 300, 403
    pointers = np.where(
        rng.random(rows + 1) < 0.3, rng.integers(0, 2**32, rows + 1), rng.integers(0, 403, rows + 1)
    )
    planes = metal.Planes(
        metal.aligned(rng.integers(-128, 128, (1, capacity), np.int8)),
        metal.aligned(rng.integers(0, 256 if seed % 2 else 4, (1, capacity), np.uint8)),
        metal.aligned(rng.integers(0, 2**16, (1, capacity), np.uint16)) if manifold == "prime" else None,
        metal.aligned(np.ones((1, rows), np.float32)),
        metal.aligned(pointers.astype(np.uint32)[None]),
        (rows, columns),
    )
    x = rng.standard_normal((1, vectors, columns)).astype(np.float32)
    memory -= 40_000 if manifold == "unit" and memory < 1 << 16 else 0
    ours = product(planes, x, [0], memory=memory, sanitize=sanitize)
    others = metal.product("sparse_matvec", planes, x)
    # Both read what row pointers and deltas of any content mean; 2**24 * 128 bounds every level.
    magnitude = metal.product(
        "sparse_matvec", dataclasses.replace(planes, values=np.abs(planes.values)), np.abs(x)
    )
    assert np.all(np.abs(ours - others) <= 4 * 405 * 2.0**-24 * np.abs(magnitude) + 1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=str)
def test_levels_are_exact_in_every_dtype(case, dtype):
    planes = metal.Planes.of(case.layer)
    rows, columns = planes.shape
    work = metal_ops.Work(
        operation="decode", rows=rows, columns=columns, capacity=planes.values.shape[1], dtype=dtype
    )
    result = metal.aligned(np.full((1, rows, columns), 77, DTYPES[dtype]))
    raw = result.view(np.uint16) if dtype == "bfloat16" else result
    launch(metal_ops.levels_plan(work), planes, raw, {7: np.zeros(1, np.int32)})
    scales = np.asarray(case.layer.scales, np.float32)[:, None]
    np.testing.assert_array_equal(result[0].astype(np.float32) * scales, oracle.decode_layer(case.layer))
