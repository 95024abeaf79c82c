"""The decoder against `transformers` on the same float32 weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import CONFIGS, dense_model, reference_logits

from upg_jax.models import forward, init_cache, is_stacked

TOLERANCE = 1e-4
VOCABULARY = 101
compiled = jax.jit(forward, static_argnames=("config", "last_only"))


def ids_for(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).integers(0, VOCABULARY, (batch, tokens))


def new_cache(model, batch, capacity):
    stacked = is_stacked(model.params["layers"])
    return init_cache(model.config, batch, capacity, dtype=jnp.float32, stacked=stacked)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward_equals_transformers(name):
    ids = ids_for(2, 70)
    model = dense_model(name)
    logits, cache = compiled(model.params, model.config, jnp.asarray(ids))
    assert cache is None
    assert logits.dtype == jnp.float32
    expected = reference_logits(name, ids)
    assert np.abs(expected).max() > 1, "logits this small would pass whatever is computed"
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["grouped-query", "multi-head", "one-kv-head", "everything"])
def test_token_by_token_through_the_cache_equals_transformers(name):
    # 70 tokens, so that attention goes through more than one window length.
    ids = ids_for(2, 70)
    expected = reference_logits(name, ids)
    model = dense_model(name)
    cache = new_cache(model, 2, 96)
    for t in range(ids.shape[1]):
        logits, cache = compiled(model.params, model.config, jnp.asarray(ids[:, t : t + 1]), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(cache.lengths, [70, 70])


def test_chunk_by_chunk_equals_transformers():
    ids = ids_for(2, 70)
    expected = reference_logits("everything", ids)
    model = dense_model("everything")
    cache = new_cache(model, 2, 70)
    start = 0
    for length in (17, 40, 13):
        part = jnp.asarray(ids[:, start : start + length])
        logits, cache = compiled(model.params, model.config, part, cache)
        np.testing.assert_allclose(logits, expected[:, start : start + length], atol=TOLERANCE, rtol=0)
        start += length


def test_rows_of_different_lengths_are_independent_and_padding_is_never_seen():
    model = dense_model("everything")
    ids = ids_for(3, 40)
    lengths = np.array([40, 7, 23], np.int32)
    cache = new_cache(model, 3, 64)
    logits, cache = compiled(
        model.params, model.config, jnp.asarray(ids), cache, counts=jnp.asarray(lengths), last_only=True
    )
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, length in enumerate(lengths):
        expected = reference_logits("everything", ids[row : row + 1, :length])[0, -1]
        np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE, rtol=0)
    # One row pauses while the others go on.
    more = ids_for(3, 5)
    counts = np.array([5, 0, 3], np.int32)
    logits, cache = compiled(model.params, model.config, jnp.asarray(more), cache, counts=jnp.asarray(counts))
    np.testing.assert_array_equal(cache.lengths, lengths + counts)
    for row in (0, 2):
        whole = np.concatenate([ids[row, : lengths[row]], more[row, : counts[row]]])[None]
        expected = reference_logits("everything", whole)[0, lengths[row] :]
        np.testing.assert_allclose(logits[row, : counts[row]], expected, atol=TOLERANCE, rtol=0)


def test_bfloat16_activations_follow_float32():
    ids = ids_for(2, 30)
    expected = reference_logits("everything", ids)
    model = dense_model("everything", "bfloat16")
    logits, cache = compiled(model.params, model.config, jnp.asarray(ids), model.init_cache(2, 32))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.keys, cache.values))} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 keeps 8 bits; a residual stream of a few additions and products loses a few of them.
    error = np.abs(np.asarray(logits) - expected).mean() / np.abs(expected).mean()
    assert error < 8 * 2**-8
    one, _ = compiled(model.params, model.config, jnp.asarray(ids[:1, :1]), model.init_cache(1, 32))
    np.testing.assert_allclose(one[0, 0], logits[0, 0], atol=0.1 * np.abs(expected).mean(), rtol=0)


def test_gradients_reach_every_parameter():
    model = dense_model("everything")
    ids = jnp.asarray(ids_for(1, 12))

    def loss(params):
        logits, _ = compiled(params, model.config, ids)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    gradients = jax.jit(jax.grad(loss))(model.params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        # A key's bias shifts all scores of a query alike, up to rotation, so it may be small, but never zero.
        assert np.abs(gradient).max() > 0, path
