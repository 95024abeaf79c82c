"""GGUF files (llama.cpp's format) as checkpoints with Hugging Face names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax.io._checkpoint import layer_order, read_bytes, unknown_tensor
from upg_jax.io._gguf_header import GGUFTensor, import_gguf, read_header

ARCHITECTURES = ("llama",)

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"

# What every Llama 3.1, 3.2 and 3.3 model uses; a GGUF file keeps only the factors that follow from it.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GGUFCheckpoint:
    """A GGUF file; see `Checkpoint`. Quantized tensors are dequantized to float32."""

    def __init__(self, path: Path):
        self.path = path
        header = read_header(path)
        self._metadata = header.metadata
        architecture = self._metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: is of architecture {architecture!r}; this build reads {', '.join(ARCHITECTURES)}; "
                "use the model's Hugging Face checkpoint instead"
            )
        if self._metadata.get("llama.expert_count", 0):
            raise CheckpointError(f"{path}: is a mixture of experts, which this build does not read")
        self._rope_factors = header.tensors.pop(_ROPE_FACTORS, None)
        by_name = {self._hugging_face_name(name): tensor for name, tensor in header.tensors.items()}
        self._tensors = {name: by_name[name] for name in layer_order(by_name)}
        self.config = self._config()
        self.left_out: list[str] = []
        self._check_shapes()

    def names(self) -> list[str]:
        """Returns the tensors' Hugging Face names, in layer order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `(out_features, in_features)` for a linear layer."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives: float32 for quantized tensors."""
        kind = self._tensor(name).kind.name
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32))

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, dequantized, with the rows of query and key projections in Hugging Face's order."""
        tensor = self._tensor(name)
        raw = read_bytes(self.path, tensor.start, tensor.stop)
        if tensor.kind.name in ("F32", "F16", "BF16"):
            array = raw.view(self.dtype(name)).reshape(tensor.shape)
        else:
            rows = raw.reshape(*tensor.shape[:-1], -1)
            try:
                array = import_gguf().dequantize(rows, tensor.kind)
            except NotImplementedError as e:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} is quantized as {tensor.kind.name}, which the "
                    "installed gguf package cannot dequantize; use another quantization of the model"
                ) from e
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".self_attn.{projection}." in name:
                array = _undo_head_permutation(array, self.config[heads])
        return array

    def source_files(self) -> list[Path]:
        """Returns the GGUF file."""
        return [self.path]

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Builds the tokenizer from the metadata and writes it under Hugging Face's file names."""
        from upg_jax.io._gguf_tokenizer import tokenizer_files

        files = tokenizer_files(self._metadata, self.path)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        token_ids = {k: self.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {k: v for k, v in token_ids.items() if v is not None}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        return [*files, "generation_config.json"]

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._tensors:
            raise unknown_tensor(self.path, name, self._tensors)
        return self._tensors[name]

    def _hugging_face_name(self, name: str) -> str:
        if name in _GLOBAL_NAMES:
            return _GLOBAL_NAMES[name]
        match = _BLOCK.fullmatch(name)
        if match is None or match[2] not in _BLOCK_NAMES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is not part of the llama architecture as this build knows it; "
                "use the model's Hugging Face checkpoint instead"
            )
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"

    def _value(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"llama.{key}", default)
        if kind is float and isinstance(value, float):
            # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(value)))
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path}: metadata 'llama.{key}' must be one {kind.__name__}; got {value!r}"
            )
        return value

    def _config(self) -> dict[str, Any]:
        embedding = self._tensor("model.embed_tokens.weight")
        heads = self._value("attention.head_count", int)
        hidden = self._value("embedding_length", int)
        rotary = self._value("rope.dimension_count", int, hidden // max(heads, 1))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": any(".self_attn." in name and name.endswith("bias") for name in self._tensors),
            "head_dim": self._value("attention.key_length", int, rotary),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self._value("feed_forward_length", int),
            "max_position_embeddings": self._value("context_length", int),
            "mlp_bias": any(".mlp." in name and name.endswith("bias") for name in self._tensors),
            "num_attention_heads": heads,
            "num_hidden_layers": self._value("block_count", int),
            "num_key_value_heads": self._value("attention.head_count_kv", int, heads),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon", float),
            "rope_theta": self._value("rope.freq_base", float, 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "vocab_size": embedding.shape[0],
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_tokens(),
            "pad_token_id": self._metadata.get("tokenizer.ggml.padding_token_id"),
        }
        if rotary != config["head_dim"]:
            raise CheckpointError(
                f"{self.path}: rotates {rotary} of {config['head_dim']} head dimensions; this build rotates "
                "all"
            )
        config["rope_scaling"] = self._rope_scaling(config["head_dim"], config["rope_theta"])
        return config

    def _end_tokens(self) -> int | list[int] | None:
        """The end-of-text id, and the end-of-turn ids where they differ from it."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = dict.fromkeys(self._metadata.get(f"tokenizer.ggml.{key}") for key in keys)
        ids = [i for i in found if i is not None]
        return ids if len(ids) > 1 else ids[0] if ids else None

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        kind = self._metadata.get("llama.rope.scaling.type", "none")
        if self._rope_factors is not None:
            t = self._rope_factors
            if t.kind.name != "F32":
                raise CheckpointError(f"{self.path}: tensor {t.name!r} must be F32; got {t.kind.name}")
            factors = read_bytes(self.path, t.start, t.stop).view(np.float32)
            scaling = {"rope_type": "llama3", "factor": float(factors.max(initial=1.0)), **_LLAMA3_ROPE}
            expected = llama3_factors(head_dim, theta, scaling)
            # The converter computes them in float64 and stores float32; 1e-4 is far above rounding and far
            # below the difference that another setting makes.
            if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
                raise CheckpointError(
                    f"{self.path}: the rotary factors {t.name!r} are not those of Llama 3; use the model's "
                    "Hugging Face checkpoint instead"
                )
            return scaling
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._value("rope.scaling.factor", float)}
        raise CheckpointError(
            f"{self.path}: scales rotary positions by {kind!r}; this build knows none, linear and Llama 3's "
            "factors"
        )

    def _check_shapes(self) -> None:
        c = self.config
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        queries, keys = (c[k] * c["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        self._check_shape("model.embed_tokens.weight", (c["vocab_size"], hidden))
        self._check_shape("model.norm.weight", (hidden,))
        for i in range(c["num_hidden_layers"]):
            for module, shape in block.items():
                self._check_shape(f"model.layers.{i}.{module}.weight", shape)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        if self.shape(name) != expected:
            raise CheckpointError(
                f"{self.path}: {name} must have shape {expected} by the metadata; got {self.shape(name)}"
            )


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """The divisors of Llama 3's rotary frequencies, float32 `(head_dim // 2,)`.

    Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those
    below `/ high_freq_factor` are kept, and the inverse divisor is linear in the frequency between.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def _undo_head_permutation(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of each head's rows from halves to interleaved pairs."""
    pairs = array.shape[0] // heads // 2
    return array.reshape(heads, pairs, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
