"""Small random Llamas in `transformers`, the independent implementation that ours is compared with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax import MdCSR, stack
from upg_jax._encode import encode_dense
from upg_jax.inference import UPGModel
from upg_jax.models import Linears, load, parse_config, stack_layers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}

# Each uses features that the others do not; together they use all of the family's.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 6, "head_dim": 8, "num_hidden_layers": 1},
    "one-kv-head": {"num_key_value_heads": 1, "num_hidden_layers": 1},
    "wide-heads": {"head_dim": 24, "num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
    "attention-bias": {"attention_bias": True, "num_hidden_layers": 1},
    "mlp-bias": {"mlp_bias": True, "num_hidden_layers": 1},
    "linear-rope": {"rope_parameters": LINEAR_ROPE, "num_hidden_layers": 1},
    "everything": {
        "hidden_size": 63,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 1e-3,
    },
}


class Weights:
    """A `WeightSource` over arrays and `MdCSR` layers by name."""

    where = "test weights"

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def read_all(self, names: Any) -> Linears:
        return stack_layers([self.tensors[name] for name in names])


@functools.cache
def make(name: str) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """Returns the model of `transformers`, its configuration under Hugging Face's keys, and its weights."""
    pytest.importorskip("transformers", reason='needs transformers and torch: pip install "upg-jax[oracle]"')
    torch = pytest.importorskip("torch", reason='needs torch: pip install "upg-jax[oracle]"')
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 101,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.2,
            "attn_implementation": "eager",
            **CONFIGS[name],
        }
    )
    # More threads than one only wait for each other on matrices this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Biases begin at zero and norms at one, where a mistake would not show.
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
            assert value.dtype == torch.float32, key
    hf = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return model, hf, weights


def reference_logits(name: str, ids: np.ndarray) -> np.ndarray:
    """Float32 logits `(batch, tokens, vocab)` of `transformers`."""
    import torch

    with torch.no_grad():
        return make(name)[0](torch.tensor(ids)).logits.numpy()


def dense_model(name: str = "grouped-query", dtype: Any = "float32") -> UPGModel:
    """Our model with the same weights."""
    _, hf, weights = make(name)
    config = parse_config(hf)
    return UPGModel(params=load(config, Weights(weights), jnp.dtype(dtype)), config=config, name=name)


@functools.cache
def compressed_weights(name: str, density: float, manifold: str = "unit") -> dict[str, Any]:
    """The same weights with every linear layer of the blocks compressed."""
    _, _, weights = make(name)
    return {
        key: encode_dense(value, density=density, manifold=manifold)  # as files have them: on the host
        if value.ndim == 2 and ".layers." in key
        else value
        for key, value in weights.items()
    }


def compressed_model(name: str = "grouped-query", density: float = 0.5, manifold: str = "unit") -> UPGModel:
    """Our model with the linear layers compressed."""
    weights = compressed_weights(name, density, manifold)
    config = parse_config(make(name)[1])
    params = jax.device_put(load(config, Weights(weights), jnp.dtype("float32")))
    return UPGModel(params=params, config=config, name=name)


def repeated(model: UPGModel, layers: int) -> UPGModel:
    """The model with its first layer `layers` times, stored as it was."""

    def repeat(weights: Any) -> Any:
        if isinstance(weights, tuple):
            return (weights[0],) * layers
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[0], weights)
        many = stack([one] * layers) if isinstance(one, MdCSR) else np.stack([one] * layers)
        return jax.device_put(many)

    params = {**model.params, "layers": {key: repeat(w) for key, w in model.params["layers"].items()}}
    return dataclasses.replace(
        model, params=params, config=dataclasses.replace(model.config, layers=(0,) * layers)
    )
