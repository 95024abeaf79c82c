"""Launch plans: the right result for every shape and limit, and a reason for each choice."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked
from helpers.metal import Planes, aligned

import metal_ops
from metal_ops import PRODUCT_KERNELS, Limits, Memory, Work, open_emulated_device, plan

CASES = (
    Case("random", (33, 67)),
    Case("full_row", (67, 33), "prime", "float32", 8),
    Case("empty_rows", (33, 67), "prime"),
    Case("random", (101, 7), "unit", "float32", 4),
    Case("zero", (33, 67)),
    Case("random", (1, 1)),
)


@pytest.fixture(scope="module")
def device():
    return open_emulated_device()


def work(planes: Planes, operation="product", **more) -> Work:
    layers, capacity = planes.values.shape
    return Work(operation, *planes.shape, capacity, layers, manifold=planes.manifold, **more)


def run(device, found: metal_ops.Plan, planes: Planes, x, index, y):
    arrays = {
        "values": planes.values,
        "deltas": planes.deltas,
        "scales": planes.scales,
        "row_pointers": planes.row_pointers,
        "index": np.asarray(index, np.int32).reshape(-1),
        "x": aligned(np.asarray(x)),
    }
    if planes.prime_indices is not None:
        arrays["prime_indices"] = planes.prime_indices
        arrays["prime_table"] = aligned(metal_ops.prime_table())
    memory = {name: Memory(a.ctypes.data, a.nbytes) for name, a in arrays.items()}
    memory["y"] = Memory(y.ctypes.data, y.nbytes, written=True)
    device.run(found.launches(memory))
    return y


@pytest.mark.parametrize("vectors", [1, 2, 5])
@pytest.mark.parametrize("variant", [None, *PRODUCT_KERNELS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device, case, variant, vectors):
    planes = Planes.of(case.layer)
    x = case.x(vectors)
    y = np.full((vectors, case.shape[0]), np.nan, np.float32)
    found = plan(work(planes, vectors=vectors), device.limits, variant)
    run(device, found, planes, x, [0], y)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("limits", [Limits(threads=32), Limits(threads=100, threadgroup_memory=64)], ids=str)
@pytest.mark.parametrize("variant", PRODUCT_KERNELS)
def test_products_on_a_device_of_narrow_limits(device, limits, variant):
    case = CASES[0]
    planes, x = Planes.of(case.layer), case.x(3)
    y = np.full((3, case.shape[0]), np.nan, np.float32)
    found = plan(work(planes, vectors=3), limits, variant)
    for step in found.steps:
        assert step.threads[0] <= limits.threads
        assert sum(step.threadgroup_memory.values()) <= limits.threadgroup_memory
    run(device, found, planes, x, [0], y)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_products(device, case, vectors):
    planes = Planes.of(case.layer)
    g = case.cotangent(vectors)
    y = np.full((vectors, case.shape[1]), np.nan, np.float32)
    found = plan(work(planes, "transposed", vectors=vectors), device.limits)
    run(device, found, planes, g, [0], y)
    assert_within_bound(y, lambda g, w, s: (g * s) @ w, g, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding(device, case):
    planes = Planes.of(case.layer)
    y = np.full((1, *case.shape), np.nan, np.float32)
    run(device, plan(work(planes, "decode"), device.limits), planes, np.zeros(0, np.float32), [0], y)
    np.testing.assert_array_equal(y[0], (case.levels * case.scales[:, None]).astype(np.float32))


def test_groups_with_a_layer_of_a_stack_each(device):
    cases = tuple(Case("random", (33, 67), "prime", seed=i) for i in range(3))
    planes = Planes.of(stacked(*cases))
    x, index = cases[0].x(4, 2), [2, 0, 2, 1]
    y = np.full((4, 2, 33), np.nan, np.float32)
    found = plan(work(planes, groups=4, vectors=2), device.limits)
    run(device, found, planes, x, index, y)
    for group, layer in enumerate(index):
        case = cases[layer]
        operands = (x[group], case.levels, case.scales)
        assert_within_bound(y[group], lambda x, w, s: x @ w.T * s, *operands, terms=case.terms)


def test_every_plan_covers_its_result_and_keeps_to_the_limits():
    shapes = ((1, 1), (7, 3), (5120, 5120), (35_840, 5120), (5120, 17_920), (1, 100_000), (100_000, 1))
    limits = (Limits(), Limits(threads=64), Limits(threadgroup_memory=16 * 1024))
    for (rows, columns), density, n, limit in itertools.product(
        shapes, (0.001, 0.1, 0.5), (1, 2, 64, 1000), limits
    ):
        capacity = max(int(rows * columns * density), 1)
        base = Work("product", rows, columns, capacity, vectors=n)
        variants = [(base, v) for v in (None, *PRODUCT_KERNELS)]
        others = [(dataclasses.replace(base, operation=o), None) for o in ("transposed", "decode")]
        for case, variant in variants + others:
            found = plan(case, limit, variant)
            for step in found.steps:
                assert 32 <= step.threads[0] <= limit.threads
                assert step.threads[0] % 32 == 0
                assert sum(step.threadgroup_memory.values()) <= limit.threadgroup_memory
                assert all(m % 16 == 0 for m in step.threadgroup_memory.values())
                assert min(step.threadgroups) > 0
            assert found.scratch <= 32 << 20


def test_the_choice_and_its_reason():
    def explained(rows, columns, capacity, **more):
        return plan(Work("product", rows, columns, capacity, **more), Limits()).explain()

    assert explained(5120, 5120, 2_621_440) == (
        "sparse_matvec_simd_unit_float32: 640 x 1 x 1 threadgroups of 256 x 1 x 1 threads\n"
        "because one vector, and rows of 512 entries on average: a simdgroup for each"
    )
    assert "too few for a simdgroup" in explained(5120, 64, 20_000, manifold="prime", dtype="bfloat16")
    assert explained(64, 64, 2000, vectors=5).startswith("sparse_matvec_batch_unit_float32: 8 x 2 x 1")
    transposed = plan(Work("transposed", 5120, 640, 100_000, vectors=2), Limits()).explain()
    assert "dense_sparse_sum" in transposed
    assert "bytes of scratch memory" in transposed
    decode = plan(Work("decode", 8, 640, 100), Limits()).explain()
    assert "2 x 1 x 1 threadgroups of 128 x 1 x 1 threads, 10,240 bytes of threadgroup memory each" in decode


@pytest.mark.parametrize("operation", ["product", "transposed", "decode"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_result_launches_nothing_and_an_empty_sum_is_zero(device, operation, shape):
    found = plan(Work(operation, *shape, 0), device.limits)
    empty = {"product": shape[0] == 0, "transposed": shape[1] == 0, "decode": True}[operation]
    assert (found.explain() == "nothing to launch: the result is empty") == empty
    if not empty:
        planes = Planes.of(Case("random", shape).layer)
        of = {"product": shape[0], "transposed": shape[1]}[operation]
        y = np.full((1, of), np.nan, np.float32)
        run(device, found, planes, np.ones((1, sum(shape) - of), np.float32), [0], y)
        np.testing.assert_array_equal(y, 0)


def test_an_unknown_variant():
    with pytest.raises(ValueError, match=r"variant must be one of sparse_matvec, .*; got 'fast'"):
        plan(Work("product", 1, 1, 1), Limits(), "fast")
