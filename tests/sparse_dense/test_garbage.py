"""Planes whose content breaks the rules that only the full check knows: defined meaning, never a crash."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, sparse_dense, use_backend

ROWS, ENTRIES = 5, 36
some_seeds = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


compiled = jax.jit(sparse_dense)


@jax.jit
def both(x, layer, g):
    """A product, and the transposed one."""
    y, vjp = jax.vjp(lambda x: sparse_dense(x, layer), x)
    return y, vjp(g)[0]


def garbage(rng: np.random.Generator, manifold: str, columns: int, max_delta: int) -> MdCSR:
    """Sound row pointers around random bytes; deltas up to `max_delta`."""
    cuts = np.sort(rng.integers(0, ENTRIES // 4 + 1, ROWS - 1)) * 4
    return MdCSR(
        values=rng.integers(-128, 128, ENTRIES).astype(np.int8),
        delta_indices=rng.integers(0, max_delta + 1, ENTRIES).astype(np.uint8),
        prime_indices=rng.integers(0, 2**16, ENTRIES).astype(np.uint16) if manifold == "prime" else None,
        scales=rng.uniform(0.5, 2, ROWS).astype(np.float32),
        row_pointers=np.array([0, *cuts, ENTRIES], np.uint32),
        shape=(ROWS, columns),
        row_alignment=4,
    )


def positive_and_negative_levels(layer: MdCSR) -> list[np.ndarray]:
    """Entries of one column may cancel, so the bound must see them apart."""
    unscaled = dataclasses.replace(layer, scales=np.ones(ROWS, np.float32))
    return [
        decode_layer(dataclasses.replace(unscaled, values=layer.values.clip(*limits)))
        for limits in ((0, 127), (-128, 0))
    ]


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@given(seed=st.integers(0, 2**32 - 1))
@some_seeds
def test_structurally_sound_garbage_means_what_the_format_says(manifold, seed, backend):
    """Entries on one column add, `k` clamps to 9999, -128 is read, the prime index of a filler is ignored."""
    rng = np.random.default_rng(seed)
    layer = garbage(rng, manifold, columns=200, max_delta=3).validate("structural")
    np.testing.assert_array_equal(layer.to_dense(np.float32), decode_layer(layer))
    x = jax.device_put(rng.standard_normal((2, 200)).astype(np.float32))
    g = jax.device_put(rng.standard_normal((2, ROWS)).astype(np.float32))
    y, x_bar = both(x, layer, g)
    levels = positive_and_negative_levels(layer)
    operands = (*levels, layer.scales)
    if backend == "cuda" and manifold == "unit":  # dense levels keep 8 bits of a sum (docs/nvidia.md)
        kept = sum(levels).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        levels = [kept.view(np.float32), np.zeros_like(levels[0])]
    assert_within_bound(y, lambda x, p, n, s: x @ (p + n).T * s, x, *operands, terms=ENTRIES + 4)
    operands = (*levels, layer.scales)
    assert_within_bound(x_bar, lambda g, p, n, s: (g * s) @ (p + n), g, *operands, terms=ENTRIES + 4)


@given(seed=st.integers(0, 2**32 - 1))
@some_seeds
def test_columns_outside_the_matrix_leave_the_other_rows_alone(seed):
    """The structural check refuses them; the reference is safe all the same, so that it may run first."""
    rng = np.random.default_rng(seed)
    layer = garbage(rng, "prime", columns=700, max_delta=255)
    inside = np.array(
        [
            layer.delta_indices[begin:end].sum(dtype=np.int64) < 700
            for begin, end in zip(layer.row_pointers[:-1], layer.row_pointers[1:], strict=True)
        ]
    )
    x = jax.device_put(rng.standard_normal((2, 700)).astype(np.float32))
    wide = dataclasses.replace(layer, shape=(ROWS, ENTRIES * 255 + 1))
    expected = decode_layer(wide)[:, :700]
    padded = np.pad(x, ((0, 0), (0, wide.in_features - 700)))
    np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), expected)
    with use_backend("reference"):
        y, x_bar = (np.asarray(a) for a in both(x, layer, np.ones((2, ROWS), np.float32)))
        whole = np.asarray(compiled(padded, wide))
    np.testing.assert_array_equal(y[:, inside], whole[:, inside])
    np.testing.assert_array_equal(np.isfinite(x_bar), True)
