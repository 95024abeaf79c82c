"""Small random models of several families, as the files that `upg-jax compress` makes; needs no other library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from upg_jax import MdCSR, save
from upg_jax.models import parse_config, weights

PROMPTS = [[5, 17, 80, 3, 9, 41, 66], [2, 2, 30]]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "stop_at_eos": False}

_COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# Name of a case -> a configuration under Hugging Face's keys. KV heads, inner features and vocabularies rarely divide.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 104,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def write(directory: Path, name: str, *, dense: tuple[str, ...] = ()) -> Path:
    """Writes a model whose projections are compressed, but for those whose slot is among `dense`."""
    hf = _COMMON | CONFIGS[name]
    config = parse_config(hf)
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for weight in weights(config):
        for tensor in weight.names(config.num_layers):
            w = rng.normal(size=weight.shape, scale=0.2).astype(np.float32)
            compressed = weight.linear and weight.slot not in dense
            tensors[tensor] = MdCSR.from_dense(w, density=0.5) if compressed else w + (w.ndim == 1)
    path = directory / f"{name}.safetensors"
    save(path, tensors, model=hf)
    return path
