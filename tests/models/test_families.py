"""Every family against `transformers` on the same float32 weights, read from the files that it writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import CASES, VOCABULARY, WINDOW, dense_model, reference_logits

from upg_jax.models import forward

TOLERANCE = 1e-4
TOKENS = 70
compiled = jax.jit(forward, static_argnames=("config", "last_only"))


def ids_for(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).integers(1, VOCABULARY, (batch, tokens))


@pytest.mark.parametrize("name", CASES)
def test_full_forward_equals_transformers(name):
    ids, model = ids_for(2, TOKENS), dense_model(name)
    logits, _ = compiled(model.params, model.config, jnp.asarray(ids))
    expected = reference_logits(name, ids)
    assert np.abs(expected).max() > 1, "logits this small would pass whatever is computed"
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_through_the_cache_equals_transformers(name):
    assert TOKENS > 2 * WINDOW
    ids, model = ids_for(2, TOKENS), dense_model(name)
    expected = reference_logits(name, ids)
    cache = model.init_cache(2, TOKENS)
    for t in range(TOKENS):
        logits, cache = compiled(model.params, model.config, jnp.asarray(ids[:, t : t + 1]), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "phi3"])
def test_chunks_of_any_length_through_the_cache_equal_transformers(name):
    ids, model = ids_for(2, TOKENS), dense_model(name)
    expected = reference_logits(name, ids)
    cache, start = model.init_cache(2, TOKENS), 0
    # Shorter and longer than the window, before and after it is full.
    for length in (8, 8, 26, 1, 26, 1):
        part = jnp.asarray(ids[:, start : start + length])
        logits, cache = compiled(model.params, model.config, part, cache)
        np.testing.assert_allclose(logits, expected[:, start : start + length], atol=TOLERANCE, rtol=0)
        start += length
    assert start == TOKENS
