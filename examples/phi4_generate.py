"""Generates text with Phi-4, and says how many tokens a second.

    python examples/phi4_generate.py DIRECTORY --prompt "Why is the sky blue?"
    python examples/phi4_generate.py DIRECTORY --random

DIRECTORY is a compressed model (`upg-jax compress`), or a Hugging Face checkpoint, whose layers stay dense. With
`--random` it is made first, if need be: a model of Phi-4's shapes with random weights, which says nothing of interest
at the real thing's speed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from upg_jax import MdCSR, UPGModel, save
from upg_jax.models import parse_config, weights

PHI_4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def write_random_model(directory: Path, layers: int, density: float) -> None:
    """Writes all of a model or nothing. Its layers are all alike: a matrix of each shape is made once."""
    config = PHI_4 | {"num_hidden_layers": layers}
    rng = np.random.default_rng(0)
    tensors: dict[str, MdCSR | np.ndarray] = {}
    for weight in weights(parse_config(config)):
        print(f"making {weight.name} {weight.shape}", flush=True)
        tensor: MdCSR | np.ndarray = np.ones(weight.shape, np.float32)
        if len(weight.shape) == 2:
            dense = 0.02 * rng.standard_normal(weight.shape, np.float32)
            inner = weight.per_layer
            tensor = MdCSR.from_dense(
                dense, density=density if inner else 1.0, index="delta8" if inner else "dense"
            )
        tensors |= dict.fromkeys(weight.names(layers), tensor)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        made = Path(temporary) / directory.name
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config))
        save(made / "model.safetensors", tensors, model=config)
        made.rename(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--random", action="store_true", help="make a random model there, if there is none")
    parser.add_argument("--layers", type=int, default=40, help="of a random model")
    parser.add_argument("--density", type=float, default=0.5, help="of a random model")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--tokens", type=int, default=64, help="to generate at most")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations: bfloat16 or float32")
    arguments = parser.parse_args()
    if arguments.random and not arguments.directory.exists():
        write_random_model(arguments.directory, arguments.layers, arguments.density)
    began = time.perf_counter()
    model = UPGModel.from_file(arguments.directory, dtype=arguments.dtype)
    print(f"{model}, loaded in {time.perf_counter() - began:.2f} s")
    prompt = arguments.prompt if model.tokenizer is not None else [1, 2, 3, 4, 5, 6, 7, 8]
    settings = {"max_new_tokens": arguments.tokens, "stop_at_eos": not arguments.random}
    next(model.stream(prompt, **settings))  # compiles for that many tokens
    began, count = time.perf_counter(), 0
    for token in model.stream(prompt, **settings):
        count += token.id is not None
        print(token.text, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{count} tokens in {seconds:.1f} s, the prompt included: {count / seconds:.2f} tokens/s")


if __name__ == "__main__":
    main()
