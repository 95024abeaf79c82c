"""Every family against `transformers` on the same float32 weights, read from the files that it writes."""

from __future__ import annotations

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import CASES, VOCABULARY, WINDOW, dense_model, reference_logits, tensors
from helpers.hf_llama import Weights

from upg_jax import CheckpointError
from upg_jax.models import forward, load, parse_config

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


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
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


def test_sequences_within_the_original_context_use_the_short_factors():
    ids, model = ids_for(2, 30), dense_model("phi3")
    short, long = (model.config.kinds[0].rope.angles(jnp.asarray(ids), n)[0] for n in (32, 33))
    assert np.abs(short - long).max() > 0.1
    logits, _ = compiled(model.params, model.config, jnp.asarray(ids))
    np.testing.assert_allclose(logits, reference_logits("phi3", ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_activations_stay_bfloat16(name):
    model = dense_model(name, "bfloat16")
    ids = jnp.zeros((2, TOKENS), jnp.int32)
    step = functools.partial(compiled, config=model.config)
    logits, cache = jax.eval_shape(step, model.params, ids=ids, cache=model.init_cache(2, TOKENS))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.keys, cache.values))} == {jnp.dtype(jnp.bfloat16)}


# Those that are not slow do between them all that families do besides products: norms, caps, gates, LongRoPE, routers.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("gemma2", "phi3", "mixtral") else [pytest.mark.slow])
        for name in CASES
    ],
)
def test_bfloat16_activations_follow_float32(name):
    ids, model = ids_for(2, TOKENS), dense_model(name, "bfloat16")
    logits, _ = compiled(model.params, model.config, jnp.asarray(ids), model.init_cache(2, TOKENS))
    expected = reference_logits(name, ids)
    # As for Llama: 8 bits, of which a residual stream of a few additions and products loses a few.
    assert np.abs(logits - expected).mean() < 8 * 2**-8 * np.abs(expected).mean()


@pytest.mark.parametrize("name", CASES)
def test_every_missing_extra_or_misshaped_tensor_is_named(name):
    config, whole = dense_model(name).config, tensors(name)
    names = [key for key in whole if ".layers." not in key or ".layers.0." in key]
    assert len(names) >= 9
    for key in names:
        without = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(CheckpointError, match=re.escape(f"needs tensor {key!r}, which is missing")):
            load(config, Weights(without), jnp.dtype("float32"))
        wrong = whole | {key: np.zeros((*whole[key].shape, 1), np.float32)}
        with pytest.raises(
            CheckpointError, match=re.escape(f"tensor {key!r} must have shape {whole[key].shape}")
        ):
            load(config, Weights(wrong), jnp.dtype("float32"))
        extra = key.replace(".layers.0.", ".layers.99.") + "_more"
        with pytest.raises(CheckpointError, match=re.escape(f"tensor {extra!r} is not part of the model")):
            load(config, Weights(whole | {extra: whole[key]}), jnp.dtype("float32"))


# What the published checkpoints' configurations look like, which are of many versions.
_FEW = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 20,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.5], "long_factor": [2.5]}
PUBLISHED = {
    "mistral-least": ("Mistral", {}),
    "mistral-v0.3": ("Mistral", {"sliding_window": None, "rope_theta": 1e6, "num_key_value_heads": 8}),
    "mixtral-least": ("Mixtral", {}),
    "mixtral-8x7b": ("Mixtral", {"sliding_window": None, "num_local_experts": 8, "rope_theta": 1e6}),
    "phi3-least": ("Phi3", {}),
    "phi3-mini-128k": (
        "Phi3",
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": _LONGROPE,
            "sliding_window": 262144,
        },
    ),
    "phi4-mini": (
        "Phi3",
        {
            "hidden_size": 256,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 3.0]},
            "tie_word_embeddings": True,
        },
    ),
    "phi4": ("Phi3", {"rope_scaling": None, "rope_theta": 250000, "max_position_embeddings": 16384}),
    "qwen2-least": ("Qwen2", {}),
    "qwen2.5": ("Qwen2", {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 4}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 4}),
    "qwen3-least": ("Qwen3", {}),
    "qwen3": (
        "Qwen3",
        {"head_dim": 128, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
    ),
    "gemma2-least": ("Gemma2", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 224, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma3-least": ("Gemma3", {}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_any_version_mean_what_transformers_reads_in_them(name):
    transformers = pytest.importorskip("transformers", reason='pip install "upg-jax[oracle]"')
    prefix, changes = PUBLISHED[name]
    config = _FEW | changes | {"architectures": [f"{prefix}ForCausalLM"]}
    theirs = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    # It writes all keys, under their newest names.
    assert parse_config(config) == parse_config(theirs.from_dict(copy.deepcopy(config)).to_dict())


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_old_names_of_longrope_mean_the_same(old):
    config = _FEW | PUBLISHED["phi3-mini-128k"][1] | {"architectures": ["Phi3ForCausalLM"]}
    assert parse_config(config | {"rope_scaling": _LONGROPE | {"type": old}}) == parse_config(config)


def test_layers_alternate_as_the_families_say():
    minimal = {**_FEW, "num_hidden_layers": 14}
    gemma_2 = parse_config(minimal | {"architectures": ["Gemma2ForCausalLM"]})
    assert [gemma_2.kinds[kind].window for kind in gemma_2.layers] == [4096, None] * 7
    gemma_3 = parse_config(minimal | {"architectures": ["Gemma3ForCausalLM"]})
    windows = [gemma_3.kinds[kind].window for kind in gemma_3.layers]
    assert windows == [4096] * 5 + [None] + [4096] * 5 + [None] + [4096] * 2
    thetas = [gemma_3.kinds[kind].rope.frequencies[1] ** (-256 / 2) for kind in (0, 1)]
    np.testing.assert_allclose(thetas, [1e4, 1e6], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 7},
            "'layer_types' must be one of full_attention, sliding_attention",
        ),
        (
            {"layer_types": ["linear_attention"] * 8},
            "'layer_types' must be one of full_attention, sliding_attention",
        ),
        ({"hidden_activation": "relu"}, "'hidden_activation' must be one of gelu_pytorch_tanh; got 'relu'"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' = True is not supported"),
        ({"attn_logit_softcapping": -1.0}, "'attn_logit_softcapping' must be a positive number; got -1.0"),
        ({"sliding_window": 0}, "'sliding_window' must be a positive integer; got 0"),
        ({"num_local_experts": 8}, "'num_local_experts' = 8 is not supported"),
    ],
)
def test_what_gemma_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        parse_config(_FEW | {"architectures": ["Gemma2ForCausalLM"]} | changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "Mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok must be at most num_local_experts; got 9 and 8",
        ),
        (
            "Phi3",
            {"partial_rotary_factor": 1.5},
            "'partial_rotary_factor' must be above 0 and at most 1; got 1.5",
        ),
        (
            "Phi3",
            {"rope_scaling": _LONGROPE | {"short_factor": [1.0, 2.0]}},
            "rope 'short_factor' must be a list of 1 numbers; got [1.0, 2.0]",
        ),
        (
            "Phi3",
            {"rope_scaling": _LONGROPE | {"long_factor": None}},
            "rope 'long_factor' must be a list of 1",
        ),
        ("Qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    ],
)
def test_what_the_others_cannot_be_is_refused_by_name(architecture, changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        parse_config(_FEW | {"architectures": [f"{architecture}ForCausalLM"]} | changes)
