"""Any content of the planes is safe and means what docs/format.md says; two orders of lanes give the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import metal
from helpers.bounds import assert_within_bound
from helpers.layers import Case
from helpers.metal import Planes
from oracle.mdcsr import primes

ROWS, COLUMNS, ENTRIES = 9, 300, 403
SANITIZERS = "address,undefined"


def garbage(seed: int, manifold: str) -> Planes:
    rng = np.random.default_rng(seed)
    pointers = rng.integers(0, ENTRIES + 1, ROWS + 1)
    pointers = np.where(rng.random(ROWS + 1) < 0.2, rng.integers(0, 2**32, ROWS + 1), pointers)
    return Planes(
        values=metal.aligned(rng.integers(-128, 128, (1, ENTRIES)).astype(np.int8)),
        # Small deltas repeat columns and stay inside; large ones leave the matrix.
        deltas=metal.aligned(rng.integers(0, (2, 5, 256)[seed % 3], (1, ENTRIES)).astype(np.uint8)),
        prime_indices=metal.aligned(rng.integers(0, 2**16, (1, ENTRIES)).astype(np.uint16))
        if manifold == "prime"
        else None,
        scales=rng.uniform(0.5, 2, (1, ROWS)).astype(np.float32),
        row_pointers=pointers[None].astype(np.uint32),
        shape=(ROWS, COLUMNS),
    )


def meaning(planes: Planes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels that lie inside the matrix: float32 sums in order; in float64 the positive and the negative ones."""
    dense = np.zeros((ROWS, COLUMNS), np.float32)
    signed = np.zeros((2, ROWS, COLUMNS))
    for row in range(ROWS):
        begin, end = (min(int(p), ENTRIES) for p in planes.row_pointers[0, row : row + 2])
        column = 0
        for i in range(begin, end):
            column += int(planes.deltas[0, i])
            if column >= COLUMNS:
                break
            level = int(planes.values[0, i])
            if planes.prime_indices is not None:
                level *= primes()[min(int(planes.prime_indices[0, i]), 9_999)]
            dense[row, column] += np.float32(level)
            signed[int(level < 0), row, column] += level
    return dense, *signed


@pytest.mark.parametrize("manifold", metal.MANIFOLDS)
def test_garbage_means_what_the_format_says(manifold):
    check_garbage(manifold, seeds=12)


@pytest.mark.slow
@pytest.mark.parametrize("manifold", metal.MANIFOLDS)
def test_garbage_stays_inside_every_buffer(manifold):
    check_garbage(manifold, seeds=6, sanitize=SANITIZERS)


def check_garbage(manifold: str, seeds: int, **settings) -> None:
    for seed in range(seeds):
        planes, rng = garbage(seed, manifold), np.random.default_rng(seed)
        dense, plus, minus = meaning(planes)
        x = rng.standard_normal((1, 3, COLUMNS)).astype(np.float32)
        g = rng.standard_normal((1, 3, ROWS)).astype(np.float32)
        # Levels of both signs may meet on one column; apart, the bound sees both.
        operands = (plus, minus, planes.scales[0])
        for kernel in metal.PRODUCTS:
            y = metal.product(kernel, planes, x, tile=64, **settings)
            assert_within_bound(
                y[0], lambda x, p, m, s: x @ (p + m).T * s, x[0], *operands, terms=ENTRIES + 4
            )
        y = metal.transposed(planes, g, **settings)
        assert_within_bound(y[0], lambda g, p, m, s: g * s @ (p + m), g[0], *operands, terms=ENTRIES + 8)
        np.testing.assert_array_equal(
            metal.decode(planes, tile=64, **settings)[0], dense * planes.scales[0][:, None]
        )


def everything(planes: Planes, **settings) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    rows, columns = planes.shape
    x = rng.standard_normal((1, 5, columns)).astype(np.float32)
    g = rng.standard_normal((1, 2, rows)).astype(np.float32)
    results = [metal.product(kernel, planes, x, tile=96, **settings) for kernel in metal.PRODUCTS]
    return [*results, metal.transposed(planes, g, **settings), metal.decode(planes, tile=96, **settings)]


PLANES = [
    pytest.param(lambda: garbage(0, "prime"), id="garbage-repeating-columns"),
    pytest.param(lambda: garbage(2, "unit"), id="garbage-outside"),
    pytest.param(lambda: Planes.of(Case("random", (33, 670), "prime").layer), id="random"),
    pytest.param(lambda: Planes.of(Case("random", (33, 670), "unit", row_alignment=8).layer), id="aligned"),
    pytest.param(lambda: Planes.of(Case("empty_rows", (33, 67), "unit").layer), id="empty-rows"),
]


@pytest.mark.parametrize("planes", PLANES)
def test_no_order_of_lanes_and_no_number_of_threads_changes_a_bit(planes):
    planes = planes()
    expected = everything(planes)
    for settings in ({"order": "reverse"}, {"threads": 3}, {"order": "reverse", "threads": 2}):
        for a, b in zip(expected, everything(planes, **settings), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_sanitizers_find_nothing(entries, planes):
    planes = planes()
    rng = np.random.default_rng(0)
    rows, columns = planes.shape
    macros = {"LANE_ENTRIES": entries}
    x = rng.standard_normal((1, 5, columns)).astype(np.float32)
    g = rng.standard_normal((1, 2, rows)).astype(np.float32)
    for kernel in metal.PRODUCTS:
        y = metal.product(kernel, planes, x, tile=96, macros=macros, sanitize=SANITIZERS)
        np.testing.assert_array_equal(y, metal.product(kernel, planes, x, tile=96, macros=macros))
    assert np.isfinite(metal.transposed(planes, g, macros=macros, sanitize=SANITIZERS)).all()
    assert np.isfinite(metal.decode(planes, tile=96, macros=macros, sanitize=SANITIZERS)).all()


def test_a_matrix_without_columns_gives_zeros():
    planes = garbage(0, "unit")
    empty = Planes(planes.values, planes.deltas, None, planes.scales, planes.row_pointers, (ROWS, 0))
    x = np.zeros((1, 3, 0), np.float32)
    for kernel in metal.PRODUCTS:
        np.testing.assert_array_equal(metal.product(kernel, empty, x, tile=4), np.zeros((1, 3, ROWS)))


@pytest.mark.parametrize("manifold", metal.MANIFOLDS)
def test_an_entry_one_column_outside_ends_its_row(manifold):
    """Where the next vector begins, so that reading it would show."""
    deltas = np.array([[255, 0, 0, 254, 1, 0]], np.uint8)
    planes = Planes(
        values=metal.aligned(np.full((1, 6), 100, np.int8)),
        deltas=metal.aligned(deltas),
        prime_indices=metal.aligned(np.zeros((1, 6), np.uint16)) if manifold == "prime" else None,
        scales=np.ones((1, 2), np.float32),
        row_pointers=np.array([[0, 3, 6]], np.uint32),
        shape=(2, 255),
    )
    dense = np.zeros((2, 255), np.float32)
    dense[1, 254] = 200 if manifold == "prime" else 100
    x, g = np.ones((1, 3, 255), np.float32), np.ones((1, 3, 2), np.float32)
    for kernel in metal.PRODUCTS:
        np.testing.assert_array_equal(metal.product(kernel, planes, x, tile=100), x @ dense.T)
    for parts in (1, 2):
        np.testing.assert_array_equal(metal.transposed(planes, g, parts=parts), g @ dense)
    np.testing.assert_array_equal(metal.decode(planes, tile=100)[0], dense)
