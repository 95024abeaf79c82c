"""Any content of the planes is safe: what a valid layer could not hold adds nothing, and nothing crashes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, sparse_dense

ROWS, COLUMNS, ENTRIES = 9, 300, 400


def garbage(rng: np.random.Generator, manifold: str, pointers: np.ndarray) -> MdCSR:
    return MdCSR(
        values=jax.device_put(rng.integers(-128, 128, ENTRIES).astype(np.int8)),
        delta_indices=jax.device_put(rng.integers(0, 256, ENTRIES).astype(np.uint8)),
        prime_indices=jax.device_put(rng.integers(0, 2**16, ENTRIES).astype(np.uint16))
        if manifold == "prime"
        else None,
        scales=jax.device_put(rng.uniform(0.5, 2, ROWS).astype(np.float32)),
        row_pointers=jax.device_put(pointers.astype(np.uint32)),
        shape=(ROWS, COLUMNS),
    )


def packed_garbage(rng: np.random.Generator, manifold: str, index: str, pointers: np.ndarray) -> MdCSR:
    size = ROWS * 40 if index == "mask" else 0
    bits = rng.integers(0, 256, size) & rng.integers(0, 256, size)
    layer = garbage(rng, manifold, pointers)
    return dataclasses.replace(layer, index=index, delta_indices=jax.device_put(bits.astype(np.uint8)))


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", ["mask", "dense"])
def test_entries_without_columns_and_columns_without_entries_add_nothing(index, manifold, n, kernels):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        pointers = np.concatenate([[0], np.sort(rng.integers(0, ENTRIES + 1, ROWS))])
        layer = packed_garbage(rng, manifold, index, pointers)
        dense = decode_layer(layer)
        x = jax.device_put(rng.standard_normal((n, COLUMNS)).astype(np.float32))
        g = jax.device_put(rng.standard_normal((n, ROWS)).astype(np.float32))
        y, vjp = jax.vjp(lambda x, layer=layer: sparse_dense(x, layer), x)
        levels = decode_layer(dataclasses.replace(layer, scales=jnp.ones(ROWS)))
        assert_within_bound(y, lambda x, w, s: x @ w.T * s, x, levels, layer.scales, terms=ENTRIES + 4)
        assert_within_bound(vjp(g)[0], lambda g, w, s: g * s @ w, g, levels, layer.scales, terms=ENTRIES + 4)
        np.testing.assert_array_equal(np.asarray(layer.to_dense(np.float32)), dense)


def dropped(layer: MdCSR) -> np.ndarray:
    """Magnitudes and values of the levels that lie inside the matrix: float64 `(2, rows, columns)`."""
    from oracle.mdcsr import primes

    planes = {name: np.asarray(getattr(layer, name)).astype(np.int64) for name in ("values", "delta_indices")}
    dense = np.zeros((2, ROWS, COLUMNS))
    for row in range(ROWS):
        begin, end = (int(p) for p in np.asarray(layer.row_pointers)[row : row + 2])
        columns = np.cumsum(planes["delta_indices"][begin:end])
        levels = planes["values"][begin:end]
        if layer.prime_indices is not None:
            k = np.asarray(layer.prime_indices)[begin:end]
            levels = levels * np.asarray(primes())[np.minimum(k, 9_999)]
        inside = columns < COLUMNS
        np.add.at(dense[0, row], columns[inside], np.abs(levels[inside]))
        np.add.at(dense[1, row], columns[inside], levels[inside])
    return dense


@pytest.mark.parametrize("n", [1, 3, 6, 40])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_entries_outside_the_matrix_add_nothing(manifold, n, kernels):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        pointers = np.concatenate([[0], np.sort(rng.integers(0, ENTRIES + 1, ROWS))])
        layer = garbage(rng, manifold, pointers)
        x = jax.device_put(rng.standard_normal((n, COLUMNS)).astype(np.float32))
        g = jax.device_put(rng.standard_normal((n, ROWS)).astype(np.float32))
        y, vjp = jax.vjp(lambda x, layer=layer: sparse_dense(x, layer), x)
        magnitudes, levels = dropped(layer)
        # Levels of both signs may meet on one column: split them, so that the bound sees both.
        parts = ((magnitudes + levels) / 2, (levels - magnitudes) / 2)
        operands = (*parts, layer.scales)
        assert_within_bound(y, lambda x, p, m, s: x @ (p + m).T * s, x, *operands, terms=ENTRIES + 4)
        assert_within_bound(vjp(g)[0], lambda g, p, m, s: g * s @ (p + m), g, *operands, terms=ENTRIES + 4)
        np.testing.assert_array_equal(
            np.asarray(layer.to_dense(np.float32)),
            levels.astype(np.float32) * np.asarray(layer.scales)[:, None],
        )


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
def test_row_pointers_of_any_kind_crash_nothing(index, manifold, n, kernels):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pointers = rng.integers(0, [ENTRIES, 2**32][seed % 2], ROWS + 1)
        layer = garbage(rng, manifold, pointers)
        if index != "delta8":
            layer = packed_garbage(rng, manifold, index, pointers)
        y, vjp = jax.vjp(lambda x, layer=layer: sparse_dense(x, layer), jnp.ones((n, COLUMNS)))
        assert y.shape == (n, ROWS)
        assert vjp(jnp.ones((n, ROWS)))[0].shape == (n, COLUMNS)
        assert layer.to_dense(np.float32).shape == (ROWS, COLUMNS)


# One row of 2**26 columns: its bfloat16 result takes 128 MB, the float32 row before rounding 256 MB more. A thread's
# arena, which a limit does not count, has 64 MB at most.
WANT_OF_MEMORY = """
import resource
import jax, jax.numpy as jnp, numpy as np
from upg_jax import MdCSR

def decoding(columns):
    planes = {"values": np.int8, "delta_indices": np.uint8}
    layer = MdCSR(
        **{name: jnp.zeros(0, dtype) for name, dtype in planes.items()},
        scales=jnp.ones(1),
        row_pointers=jnp.zeros(2, jnp.uint32),
        prime_indices=None,
        shape=(1, columns),
    )
    compiled = jax.jit(lambda layer: layer.to_dense(jnp.bfloat16)).lower(layer).compile()
    return lambda: jax.block_until_ready(compiled(layer))

large, small = decoding(1 << 26), decoding(64)
small()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    large()
except Exception as error:
    print(error)
print(small().shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where a process can be held to some memory")
def test_want_of_memory_in_a_handler_is_an_error_and_the_process_goes_on():
    done = subprocess.run([sys.executable, "-c", WANT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    error, shape = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert "RESOURCE_EXHAUSTED: upg_jax: out of memory" in error
    assert shape == "(1, 64)"
