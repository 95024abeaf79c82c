"""A small random Llama, and the files it may come in: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCABULARY = 2, 4, 2, 16, 256, 96, 320


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def weights(seed: int = 0, tied: bool = False, layers: int = LAYERS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes = {f"model.layers.{i}.{k}": v for i in range(layers) for k, v in shapes.items()}
    shapes |= {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    if not tied:
        shapes["lm_head"] = (VOCABULARY, HIDDEN)
    return {
        f"{k}.weight": (rng.normal(size=v, scale=0.1) + (len(v) == 1)).astype(np.float32)
        for k, v in shapes.items()
    }


def write_hugging_face(
    directory: Path,
    tensors: dict[str, np.ndarray],
    shards: int = 1,
    dtype: Any = np.float32,
    **changes: Any,
) -> Path:
    """Writes with the stock safetensors package; `dtype` may be that of ml_dtypes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    tensors = {name: w.astype(dtype) for name, w in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def permute_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key projections: a head's two halves are interleaved."""
    head_rows = w.shape[0] // heads
    order = [h * head_rows + i + half for h in range(heads) for i in range(head_rows // 2)
             for half in (0, head_rows // 2)]  # fmt: skip
    return w[order]


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    extra_quantized: dict[str, tuple[np.ndarray, Any]] | None = None,
    architecture: str = "llama",
) -> Path:
    """Writes with the `gguf` package; matrices are quantized to `kind`, vectors stay float32."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(max(int(n.split(".")[2]) for n in tensors if "layers" in n) + 1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, w in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            w = permute_rows(w, HEADS if "q_proj" in name else KV_HEADS)
        if w.ndim == 1:
            writer.add_tensor(gguf_name(name), w)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(w, quantization), raw_dtype=quantization)
    for name, w in (extra_tensors or {}).items():
        writer.add_tensor(name, w)
    for name, (raw, raw_dtype) in (extra_quantized or {}).items():
        writer.add_tensor(name, raw, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
