"""Random sparse matrices through encode -> validate(full) -> the oracle's decode, and the library's."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import mdcsr as oracle

from upg_jax._encode import encode_dense
from upg_jax._validate import validate

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def prime_levels() -> np.ndarray:
    return np.unique(np.outer(np.arange(128), np.array(oracle.primes()))).astype(np.float64)


@st.composite
def sparse_matrices(draw):
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 900))
    w = np.zeros((rows, columns), np.float64)
    if rows:
        at = st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1))
        magnitude = st.floats(-60000, 60000, width=16) | st.sampled_from([-0.0, 1e-40, 1e-6, 127.0, 1.0])
        for (row, column), value in draw(st.dictionaries(at, magnitude, max_size=60)).items():
            w[row, column] = value
        for row in draw(st.sets(st.integers(0, rows - 1), max_size=1)):
            w[row] = np.linspace(-1, 1, columns)
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return w.astype(DTYPES[dtype])


@given(
    w=sparse_matrices(),
    manifold=st.sampled_from(["unit", "prime"]),
    row_alignment=st.sampled_from([1, 2, 16]),
    extra=st.integers(0, 3),
)
@example(w=np.zeros((0, 1), np.float32), manifold="prime", row_alignment=16, extra=0)
@example(w=np.full((1, 1), 6e-8, np.float16), manifold="prime", row_alignment=1, extra=2)
def test_encoded_layers_are_valid_and_decode_to_the_nearest_levels(w, manifold, row_alignment, extra):
    tight = encode_dense(w, manifold=manifold, row_alignment=row_alignment)
    layer = encode_dense(
        w, manifold=manifold, row_alignment=row_alignment, capacity=tight.nnz + extra * row_alignment
    )
    validate(layer, "full")
    assert layer.true_nnz == tight.true_nnz
    decoded = oracle.decode_layer(layer).astype(np.float64)

    scales = layer.scales.astype(np.float64)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        target = np.where(scales > 0, np.abs(w.astype(np.float64)) / scales, 0)
        level = np.where(scales > 0, np.abs(decoded) / scales, 0)
    levels = np.arange(128.0) if manifold == "unit" else prime_levels()
    above = np.clip(np.searchsorted(levels, target), 1, levels.size - 1)
    nearest = np.minimum(np.abs(levels[above] - target), np.abs(levels[above - 1] - target))
    # A decoded weight is one rounding away from level * scale.
    assert np.all(np.abs(level - target) <= nearest + 2.0**-23 * (target + 1))
    assert np.all((decoded == 0) | (np.sign(decoded) == np.sign(w.astype(np.float64))))


@given(w=sparse_matrices(), density=st.floats(0, 1))
def test_density_never_keeps_more_than_its_share(w, density):
    layer = encode_dense(w, density=density)
    validate(layer, "full")
    assert layer.true_nnz <= round(density * w.size)
    decoded, magnitude = oracle.decode_layer(layer), np.abs(w.astype(np.float32))
    # What is missing was either smaller than all that is there, or rounded to 0.
    missing = magnitude[decoded == 0].max(initial=0)
    smallest_kept = magnitude[decoded != 0].min(initial=np.inf)
    assert missing <= max(smallest_kept, layer.scales.max(initial=0) / 2)
