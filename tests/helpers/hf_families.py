"""Small random models of every family in `transformers`, each with all features that the family has."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers.hf_llama import Weights
from upg_jax._encode import encode_dense
from upg_jax.inference import UPGModel
from upg_jax.io import open_checkpoint
from upg_jax.models import load, weights

VOCABULARY = 101
WINDOW = 20
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
_FACTORS = [1.0 + 0.5 * i for i in range(6)]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": _FACTORS,
    "long_factor": [3 * factor for factor in _FACTORS],
}
_GEMMA = {"head_dim": 16, "num_hidden_layers": 5, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
_GEMMA_3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}

# Name of a case -> the family's prefix in transformers, and what is not as in `SIZES`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama3": (
        "Llama",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    "mistral-no-window": ("Mistral", {"head_dim": 10, "sliding_window": None, "num_hidden_layers": 1}),
    # head_dim 48 / 3 = 16, of which 12 are rotated.
    "phi3": (
        "Phi3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 32,
            "rope_parameters": _LONGROPE,
        },
    ),
    "phi4": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}),
    "qwen2": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 14, "attention_bias": True}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}),
    "gemma3": (
        "Gemma3",
        _GEMMA
        | {
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
            "num_hidden_layers": 6,
            "rope_parameters": _GEMMA_3_ROPE,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW, "head_dim": 16},
    ),
}


@functools.cache
def make(name: str) -> tuple[Any, Path]:
    """Returns the model of `transformers`, and the directory it saved itself to."""
    reason = 'needs transformers and torch: pip install "upg-jax[oracle]"'
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    prefix, changes = CASES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config_class(**SIZES | changes)
    # More threads than one only wait for each other on matrices this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = without_neutral_parameters(getattr(transformers, f"{prefix}ForCausalLM")(config).eval())
    directory = _directory() / name
    model.save_pretrained(directory)
    return model, directory


def without_neutral_parameters(model: Any) -> Any:
    """Changes biases, which begin at zero, and norms, which begin at one: a mistake with them would not show."""
    import torch

    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return model


def reference_logits(name: str, ids: np.ndarray) -> np.ndarray:
    """Float32 logits `(batch, tokens, vocab)` of `transformers`."""
    import torch

    with torch.no_grad():
        return make(name)[0](torch.tensor(ids), use_cache=False).logits.numpy()


@functools.cache
def dense_model(name: str, dtype: str = "float32") -> UPGModel:
    """Our model, from the files that `transformers` wrote."""
    return UPGModel.from_file(make(name)[1], dtype=dtype)


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors that `transformers` wrote."""
    checkpoint = open_checkpoint(make(name)[1])
    return {key: checkpoint.read(key) for key in checkpoint.names()}


@functools.cache
def compressed_weights(name: str) -> dict[str, Any]:
    """The same with all projections of the blocks compressed."""
    config = dense_model(name).config
    found: dict[str, Any] = dict(tensors(name))
    for weight in weights(config):
        if weight.linear and weight.per_layer:
            for key in weight.names(config.num_layers):
                found[key] = encode_dense(found[key], density=0.6)
    return found


def model_of(name: str, found: dict[str, Any]) -> UPGModel:
    """Our model with these tensors."""
    config = dense_model(name).config
    params = jax.device_put(load(config, Weights(found), np.dtype("float32")))
    return UPGModel(params=params, config=config)


@functools.cache
def _directory() -> Path:
    keep = tempfile.TemporaryDirectory()
    _kept.append(keep)
    return Path(keep.name)


_kept: list[Any] = []
