"""The key-value cache: what is stored where, and that a donated one is never copied."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import compressed_weights, model_of
from helpers.hf_llama import compressed_model, dense_model, repeated

from upg_jax.models import forward, init_cache
from upg_jax.models._attention import Scores, attend, attend_cached, attend_fresh, window_lengths
from upg_jax.models._cache import positions_in, read, write

compiled_attend = jax.jit(attend, static_argnums=5)
compiled_attend_cached = jax.jit(attend_cached, static_argnums=(4, 7, 8))
compiled_write = jax.jit(write, static_argnums=1)


def test_tokens_are_stored_at_their_places_and_dropped_beyond_the_length():
    rng = np.random.default_rng(0)
    new = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    targets = np.array([[0, 1], [4, 5], [5, 3]])
    expected = np.zeros((2, 3, 2, 5, 4), np.float32)
    for row in range(3):
        for token in range(2):
            if targets[row, token] < 5:
                expected[1, row, :, targets[row, token]] = new[row, token]
    buffer = write(jnp.zeros((2, 3, 2, 5, 4)), 1, jnp.asarray(new), jnp.asarray(targets))
    for layer in range(2):
        np.testing.assert_array_equal(read(buffer, layer, 5), expected[layer])
        np.testing.assert_array_equal(read(buffer, layer, 2), expected[layer][:, :, :2])


@pytest.mark.parametrize("length", [1, 5, 8])
def test_positions_of_a_ring_are_those_stored_last(length):
    filled = np.arange(20)
    expected = np.full((20, length), -1)
    for row, tokens in enumerate(filled):
        for position in range(tokens):
            expected[row, position % length] = position
    found = np.array(positions_in(jnp.asarray(filled, jnp.int32), length, length))
    found[found < 0] = -1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("unrolled", "growth"), [(False, 1.5), (True, 2.0)])
@pytest.mark.parametrize("capacity", [1, 64, 65, 128, 300, 1024])
def test_windows_grow_little_by_little_up_to_the_capacity(capacity, unrolled, growth):
    windows = window_lengths(capacity, 1, unrolled)
    assert windows[-1] == capacity
    assert windows == sorted(set(windows))
    assert all(b <= growth * a for a, b in itertools.pairwise(windows))
    enough = [length for length in windows if length >= 100 or length == capacity]
    assert window_lengths(capacity, 100, unrolled) == enough


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 150])
def test_attention_over_what_is_filled_equals_attention_over_all(layers, window, length):
    rng = np.random.default_rng(length)
    scores = Scores(0.3, cap=2.0, window=window)
    capacity = 150
    q = jnp.asarray(rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    k, v = (rng.normal(size=(1, capacity, 2, 8)).astype(np.float32) for _ in range(2))
    held = capacity if window is None else window
    # Where nothing is stored lies garbage, as after a shorter answer.
    garbage = jnp.asarray(rng.normal(size=(layers, 1, 2, held, 8)), jnp.float32)
    positions = np.arange(capacity)
    stored = (positions >= length - held) & (positions < length)
    places = jnp.asarray(np.where(stored, positions % held, held))[None]
    buffers = tuple(compiled_write(garbage, layers - 1, x, places) for x in (k, v))
    past, new = jnp.array([length - 1]), [x[:, length - 1 : length] for x in (k, v)]
    out, buffers = compiled_attend_cached(
        q, *new, buffers, layers - 1, past, jnp.array([1]), capacity, scores
    )
    # Keys of later positions are not seen.
    exact = compiled_attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), past[None], positions[None], scores)
    np.testing.assert_allclose(out, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 50, 200])
def test_fresh_tokens_attend_in_blocks_as_all_at_once(window):
    rng = np.random.default_rng(0)
    tokens = 300  # two blocks and a part of one
    q = jnp.asarray(rng.normal(size=(2, tokens, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, tokens, 2, 8)), jnp.float32) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    scores = Scores(0.3, cap=2.0, window=window)
    expected = compiled_attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, positions, scores)
    found = jax.jit(attend_fresh, static_argnums=4)(q, k, v, positions, scores)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [dense_model, compressed_model])
def test_a_decode_step_updates_a_donated_cache_in_place(model):
    def memory(layers):
        deep = repeated(model(), layers)
        cache = deep.init_cache(64, 64)

        def step(params, ids, cache):
            return forward(params, deep.config, ids, cache, last_only=True)

        lowered = jax.jit(step, donate_argnums=2).lower(deep.params, jnp.zeros((64, 1), jnp.int32), cache)
        found = lowered.compile().memory_analysis()
        assert found.alias_size_in_bytes >= cache.nbytes
        return cache.nbytes, found.temp_size_in_bytes

    (small, temporary), (large, deep_temporary) = memory(2), memory(5)
    # What is not in place is one layer's window, however many layers there are; a copy of all keys, or of all
    # values, would be half of the cache.
    assert deep_temporary - temporary < 0.05 * (large - small)


@pytest.mark.parametrize("tokens", [1, 30])
def test_rings_of_a_donated_cache_are_updated_in_place(tokens):
    model = model_of("gemma3", compressed_weights("gemma3"))

    def memory(repeats):
        # So many layers that a copy of their rings would be larger than what else is temporary.
        config = dataclasses.replace(model.config, layers=model.config.layers[:3] * repeats)
        cache = init_cache(config, 1, 256, dtype=jnp.float32, stacked=True)

        def step(params, ids, cache):
            return forward(params, config, ids, cache, last_only=True)

        ids = jnp.zeros((1, tokens), jnp.int32)
        found = jax.jit(step, donate_argnums=2).lower(model.params, ids, cache).compile().memory_analysis()
        assert found.alias_size_in_bytes >= cache.nbytes
        rings = min(keys.nbytes for keys in cache.keys)
        return rings, found.temp_size_in_bytes

    (small, temporary), (large, deep_temporary) = memory(100), memory(200)
    assert deep_temporary - temporary < 0.05 * (large - small)


def test_repr_says_what_it_holds():
    cache = init_cache(dense_model().config, 3, 100, dtype=jnp.bfloat16, stacked=True)
    assert repr(cache) == "KVCache(batch=3, capacity=100, bfloat16, 0.1 MiB)"
    assert cache.nbytes == 2 * 2 * 3 * 2 * 100 * 16 * 2
