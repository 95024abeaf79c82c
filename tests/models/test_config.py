"""Reading Hugging Face configurations, and refusing what is not implemented."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.hf_llama import LLAMA3_ROPE

from upg_jax import CheckpointError
from upg_jax.models import parse_config

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason='pip install "upg-jax[oracle]"')
    config = parse_config(MINIMAL)
    theirs = transformers.LlamaConfig(**MINIMAL)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.kinds[0].rope.frequencies[1] == np.float32(theirs.rope_parameters["rope_theta"] ** -0.5)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.attention_bias == theirs.attention_bias
    assert config.mlp_bias == theirs.mlp_bias


def test_old_and_new_keys_of_rope_mean_the_same():
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = parse_config({**MINIMAL, "head_dim": 4, "rope_theta": 5000.0, "rope_scaling": scaling})
    new = parse_config({**MINIMAL, "head_dim": 4, "rope_parameters": LLAMA3_ROPE})
    assert old == new
    assert hash(old) == hash(new)


@pytest.mark.parametrize(
    "kind", [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}], ids=["old", "new"]
)
def test_linear_scaling_is_read_under_both_names(kind):
    frequencies = [
        parse_config(c).kinds[0].rope.frequencies for c in ({**MINIMAL, "rope_scaling": kind}, MINIMAL)
    ]
    np.testing.assert_array_equal(frequencies[0], np.divide(frequencies[1], 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture ['MambaForCausalLM'] is not supported; this build knows Gemma2ForCausalLM, "
            "Gemma3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Phi3ForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        (
            {"architectures": None, "model_type": "gpt2"},
            "architecture 'gpt2' is not supported; this build knows Gemma2ForCausalLM",
        ),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer; got 0"),
        ({"vocab_size": "32"}, "'vocab_size' must be a positive integer; got '32'"),
        ({"vocab_size": True}, "'vocab_size' must be a positive integer; got True"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a positive number; got nan"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false; got 1"),
        ({"hidden_act": "gelu"}, "'hidden_act' must be one of silu, swish; got 'gelu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must divide num_attention_heads; got 2 and 3"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions; got 5"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' = {'bits': 4} is not supported"),
        ({"sliding_window": 4096}, "'sliding_window' = 4096 is not supported"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5 is not supported"),
        ({"num_local_experts": 8}, "'num_local_experts' = 8 is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; this build knows default, linear, llama3, longrope",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope 'factor' must be a positive number; got None"),
        ({"rope_scaling": "linear"}, "rope parameters must be an object; got 'linear'"),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}},
            "'low_freq_factor' must be below 'high_freq_factor'; got 4.0 and 4.0",
        ),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope 'rope_theta' must be a positive number; got -1.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' other than 1 is not supported",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        parse_config({**MINIMAL, "head_dim": 4, **changes})


def test_model_type_stands_in_for_missing_architectures():
    config = {key: value for key, value in MINIMAL.items() if key != "architectures"}
    assert parse_config({**config, "model_type": "llama"}) == parse_config(MINIMAL)


@pytest.mark.parametrize("dim", [8, 64, 66])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
        {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    ],
    ids=["default", "linear", "llama3", "llama3.1"],
)
def test_rope_frequencies_equal_those_of_transformers(rope, dim):
    transformers = pytest.importorskip("transformers", reason='pip install "upg-jax[oracle]"')
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(**MINIMAL | {"head_dim": dim}, rope_parameters=rope)
    )
    ours = parse_config({**MINIMAL, "head_dim": dim, "rope_parameters": rope}).kinds[0].rope.frequencies
    # They round to float32 along the way, we at the end.
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2e-6, atol=0)
