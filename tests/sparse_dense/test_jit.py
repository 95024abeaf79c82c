"""A layer as an argument of a jitted function, closed over, donated, compiled ahead of time."""

from __future__ import annotations

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case

from upg_jax import MdCSR, sparse_dense

SMALL = Case("random", (13, 13), "prime")


def test_argument_closure_and_partial_give_the_same_bits(one_backend):
    x, layer = SMALL.x(3), SMALL.layer
    eager = sparse_dense(x, layer)
    np.testing.assert_array_equal(jax.jit(sparse_dense)(x, layer), eager)
    np.testing.assert_array_equal(jax.jit(lambda x: sparse_dense(x, layer))(x), eager)
    np.testing.assert_array_equal(jax.jit(jax.jit(sparse_dense))(x, layer), eager)


def test_outside_jit_a_product_is_one_program(one_backend, caplog):
    first, other = Case("random", (9, 14)), Case("random", (8, 15))
    bias = jnp.ones(8)
    sparse_dense(first.x(2), first.layer)  # compiles what all single layers share
    x, layer = other.x(2), other.layer
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        sparse_dense(x, layer, bias).block_until_ready()
    compiled = [line for line in caplog.messages if line.startswith("Finished XLA compilation")]
    assert len(compiled) == 1, compiled


def test_numpy_planes_as_arguments_and_closed_over(one_backend):
    x, layer = SMALL.x(3), SMALL.layer
    on_host = jax.tree.map(np.asarray, layer)
    expected = sparse_dense(x, layer)
    np.testing.assert_array_equal(jax.jit(sparse_dense)(x, on_host), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: sparse_dense(x, on_host))(x), expected)


def test_compiled_ahead_of_time(one_backend):
    compiled = jax.jit(sparse_dense).lower(SMALL.x(3), SMALL.layer).compile()
    operands = (SMALL.x(3), SMALL.levels, SMALL.scales)
    y = compiled(SMALL.x(3), SMALL.layer)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, *operands, terms=SMALL.terms)


def test_a_donated_input_gives_its_buffer_to_the_result(one_backend):
    x = SMALL.x(3)
    expected = sparse_dense(x, SMALL.layer)
    y = jax.jit(sparse_dense, donate_argnums=0)(x, SMALL.layer)
    np.testing.assert_array_equal(y, expected)
    assert x.is_deleted()


def test_a_loop_on_the_device_with_a_traced_trip_count(one_backend):
    @jax.jit
    def power(x, n):
        return jax.lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, sparse_dense(c[1], SMALL.layer)), (0, x)
        )[1]

    x = SMALL.x(2)
    y = power(x, 3)
    w = SMALL.weight
    assert_within_bound(y, lambda x, w: x @ w.T @ w.T @ w.T, x, w, terms=3 * SMALL.terms)


def test_both_branches_of_a_conditional(one_backend):
    other = Case("full_row", (13, 13), "prime")

    @jax.jit
    def either(first, x):
        return jax.lax.cond(
            first, lambda x: sparse_dense(x, SMALL.layer), lambda x: sparse_dense(x, other.layer), x
        )

    x = SMALL.x(2)
    np.testing.assert_array_equal(either(True, x), sparse_dense(x, SMALL.layer))
    np.testing.assert_array_equal(either(False, x), sparse_dense(x, other.layer))


def test_random_inputs_made_inside_the_program(one_backend):
    @jax.jit
    def sample(key):
        x = jax.random.normal(key, (3, 13))
        return x, sparse_dense(x, SMALL.layer)

    x, y = sample(jax.random.key(0))
    operands = (x, SMALL.levels, SMALL.scales)
    assert_within_bound(y, lambda x, w, s: x @ w.T * s, *operands, terms=SMALL.terms)


@pytest.mark.parametrize("vectors", [1, 300])
def test_a_layer_closed_over_compiles_about_as_fast_as_an_argument(vectors, backend):
    """XLA may evaluate what depends on constants alone while compiling, for many seconds."""
    rng = np.random.default_rng(0)
    layer = MdCSR.from_dense(rng.standard_normal((1500, 1500)).astype(np.float32), density=0.5)
    x = jnp.ones((vectors, 1500))

    def seconds(f, *args):
        lowered = jax.jit(f).lower(*args)
        begin = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - begin

    argument = seconds(sparse_dense, x, layer)
    closed_over = seconds(lambda x: sparse_dense(x, layer), x)
    # Generous: copies of the constants, and a busy machine.
    assert closed_over < 3 * argument + 2
