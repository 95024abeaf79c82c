"""Families on compressed layers: loops over kinds of layers, fused projections, and experts chosen in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import compressed_weights, dense_model, model_of
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR
from upg_jax.models import forward, is_stacked, pack_params
from upg_jax.models._experts import _blocks
from upg_jax.models._linear import repetition

TOKENS = 44
IDS = np.random.default_rng(0).integers(1, 101, (2, TOKENS))
TOLERANCE = (
    1e-4  # products are summed in another order; activations are of order 1 to 10, as with transformers
)
compiled = jax.jit(forward, static_argnames=("config", "last_only"))


def decoded_logits(name):
    found = {
        key: decode_layer(w) if isinstance(w, MdCSR) else w for key, w in compressed_weights(name).items()
    }
    model = model_of(name, found)
    return np.asarray(compiled(model.params, model.config, jnp.asarray(IDS))[0])


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "phi3", "qwen2"])
def test_compressed_families_compute_what_their_decoded_weights_do(name):
    model = model_of(name, compressed_weights(name))
    assert is_stacked(model.params["layers"])
    expected = decoded_logits(name)
    packed = dataclasses.replace(model, params=pack_params(model.params))
    assert is_stacked(packed.params["layers"])
    assert len(packed.params["layers"]) < len(model.params["layers"]) or name == "phi3"
    for one in (model, packed):
        cache = one.init_cache(2, TOKENS)
        assert len(cache.keys) == len(one.config.kinds)
        logits, cache = compiled(one.params, one.config, jnp.asarray(IDS[:, :30]), cache)
        np.testing.assert_allclose(logits, expected[:, :30], atol=TOLERANCE, rtol=0)
        for t in range(30, TOKENS):
            logits, cache = compiled(one.params, one.config, jnp.asarray(IDS[:, t : t + 1]), cache)
            np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=TOLERANCE, rtol=0)


def poisoned(model, expert):
    """The model with NaN in one expert of the first layer."""
    layers = dict(model.params["layers"])
    for name, weights in layers.items():
        if not name.startswith("experts."):
            continue
        if isinstance(weights, MdCSR):
            layers[name] = dataclasses.replace(weights, scales=weights.scales.at[expert].set(jnp.nan))
        else:
            layers[name] = (*weights[:expert], weights[expert] * jnp.nan, *weights[expert + 1 :])
    return {**model.params, "layers": layers}


@pytest.mark.parametrize("storage", ["compressed", "dense"])
def test_only_the_chosen_experts_are_computed_when_decoding(storage):
    model = (
        dense_model("mixtral") if storage == "dense" else model_of("mixtral", compressed_weights("mixtral"))
    )
    ids = jnp.asarray(IDS[:1, :1])
    expected = compiled(model.params, model.config, ids)[0]
    used = 0
    for expert in range(model.config.experts):
        logits = compiled(poisoned(model, expert), model.config, ids)[0]
        used += bool(jnp.isnan(logits).any())
        assert jnp.isnan(logits).any() or (logits == expected).all()
    assert used == model.config.experts_per_token == 2


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (8, 8), (9, 8), (33, 5), (200, 3), (70, 1)])
def test_every_pair_of_token_and_expert_has_a_place_in_a_block_of_that_expert(tokens, experts):
    rng = np.random.default_rng(tokens)
    per_token = min(2, experts)
    chosen = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :per_token].astype(np.int32)
    places, sources, expert = map(np.asarray, jax.jit(_blocks, static_argnums=1)(chosen, experts))
    size = sources.shape[1]
    assert len(np.unique(places)) == chosen.size
    np.testing.assert_array_equal(
        sources.reshape(-1)[places], np.arange(tokens)[:, None].repeat(per_token, 1)
    )
    np.testing.assert_array_equal(expert[places // size], chosen)
    assert (np.delete(sources.reshape(-1), places) == tokens).all()
    # No more work than one block of each expert beyond what is needed.
    assert sources.size <= chosen.size + experts * size


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((0,), (1, 1)),
        ((0,) * 7, (1, 7)),
        ((0, 1) * 5, (2, 5)),
        ((0, 0, 0, 0, 0, 1) * 4 + (0, 0), (6, 4)),
        ((0, 0, 0, 1, 1), (1, 3)),
        ((0, 1, 1, 0), (1, 1)),
    ],
)
def test_what_repeats_is_found(kinds, expected):
    assert repetition(kinds) == expected


def test_a_program_has_one_repetition_however_deep_the_model_is():
    model = model_of("gemma3", compressed_weights("gemma3"))
    period = model.config.layers[:3]

    def lines(repeats):
        config = dataclasses.replace(model.config, layers=period * repeats)
        return len(compiled.lower(model.params, config, jnp.asarray(IDS)).as_text().splitlines())

    assert lines(2) == lines(20)
