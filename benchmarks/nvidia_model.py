"""A whole model of Phi-4's shapes on an NVIDIA GPU: greedy decoding at batch 1 through `UPGModel`.

    python -m benchmarks.nvidia_model --out rows.jsonl [--densities 0.1 0.5] [--gpus 2] [--trace DIRECTORY]

Weights are random and made on the device, so that the text means nothing and the speed is the real thing's. Each row is
one model: tokens a second after a prompt of 512 tokens, the median of repeats, and the first device's memory.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import upg_jax
from benchmarks.nvidia import planes
from examples.phi4_generate import PHI_4
from upg_jax import UPGModel
from upg_jax.models import parse_config, shard_params, weights


def random_model(layers: int, density: float | None, manifold: str) -> UPGModel:
    """A model of bfloat16 activations; of dense matrices without a density."""
    config = parse_config({**PHI_4, "num_hidden_layers": layers})
    params: dict[str, Any] = {"layers": {}}
    for i, weight in enumerate(weights(config)):
        into = params["layers"] if weight.per_layer else params
        if weight.per_layer and weight.linear and density is not None:
            into[weight.slot] = planes(*weight.shape, density, manifold, layers)
        elif weight.per_layer and weight.linear:
            into[weight.slot] = tuple(
                0.02 * jax.random.normal(jax.random.key(layer), weight.shape, jnp.bfloat16)
                for layer in range(layers)
            )
        elif len(weight.shape) == 2:
            into[weight.slot] = 0.02 * jax.random.normal(jax.random.key(i), weight.shape, jnp.bfloat16)
        else:
            shape = (layers, *weight.shape) if weight.per_layer else weight.shape
            into[weight.slot] = jnp.ones(shape, jnp.bfloat16)
    return UPGModel(params=params, config=config)


def on_several(layers: int, density: float, manifold: str, gpus: int) -> UPGModel:
    """The same, cut over GPUs: layers have the same planes, so that one is cut, and repeated where its blocks are."""
    one = random_model(1, density, manifold)
    mesh = jax.make_mesh((gpus,), ("model",), devices=jax.devices()[:gpus])
    params = shard_params(one.params, one.config, mesh, "model")

    def repeat(leaf: jax.Array) -> jax.Array:
        shape = (layers, *leaf.shape[1:])
        return jax.jit(lambda a: jnp.broadcast_to(a, shape), out_shardings=leaf.sharding)(leaf)

    params["layers"] = jax.tree.map(repeat, params["layers"])
    return UPGModel(params=params, config=parse_config({**PHI_4, "num_hidden_layers": layers}))


def seconds_a_token(model: UPGModel, prompt: int, tokens: int) -> tuple[float, float]:
    """Of the tokens after the prompt, and the prompt's own seconds until the first token."""
    ids = [1 + i % 1000 for i in range(prompt)]
    came = [time.perf_counter()]
    for _ in model.stream(ids, max_new_tokens=tokens, stop_at_eos=False):
        came.append(time.perf_counter())
    skipped = 4
    return (came[-1] - came[skipped]) / (len(came) - 1 - skipped), came[1] - came[0]


def kernels(directory: Path) -> list[tuple[str, float, int]]:
    """Names, microseconds and calls of what ran on the device, the longest first, from a profile of JAX."""
    total: dict[str, float] = collections.Counter()
    calls: dict[str, int] = collections.Counter()
    for file in directory.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        devices = {
            e["pid"]
            for e in events
            if e.get("name") == "process_name" and "/device:GPU" in e["args"].get("name", "")
        }
        streams = {
            (e["pid"], e["tid"])
            for e in events
            if e.get("name") == "thread_name"
            and e["pid"] in devices
            and "Stream" in e["args"].get("name", "")
        }
        for e in events:
            if e.get("ph") == "X" and (e["pid"], e.get("tid")) in streams:
                total[e["name"]] += e["dur"]
                calls[e["name"]] += 1
    return [(name, took, calls[name]) for name, took in sorted(total.items(), key=lambda item: -item[1])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("nvidia_model.jsonl"))
    parser.add_argument("--densities", nargs="*", type=float, default=[0.1, 0.5])
    parser.add_argument("--dense", action="store_true", help="also the model with dense bfloat16 matrices")
    parser.add_argument("--gpus", type=int, default=1, help="share the model among so many")
    parser.add_argument("--manifold", choices=("unit", "prime"), default="unit")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="write a profile here, and print what took longest")
    options = parser.parse_args()
    device = jax.devices()[0]
    where = {"gpu": device.device_kind, "jax": jax.__version__, "upg_jax": upg_jax.__version__}
    for density in [*options.densities, *([None] if options.dense else [])]:
        if options.gpus > 1 and density is not None:
            model = on_several(options.layers, density, options.manifold, options.gpus)
        else:
            model = random_model(options.layers, density, options.manifold)
        seconds_a_token(model, options.prompt, 8)  # compiles
        found = [seconds_a_token(model, options.prompt, options.tokens) for _ in range(options.repeats)]
        memory = device.memory_stats() or {}
        row = {
            **where,
            "time": time.time(),
            "topic": "model",
            "gpus": 1 if density is None else options.gpus,
            "layers": options.layers,
            "density": density,
            "manifold": None if density is None else options.manifold,
            "prompt": options.prompt,
            "tokens": options.tokens,
            "tokens_per_second": 1 / statistics.median(token for token, _ in found),
            "all_tokens_per_second": [1 / token for token, _ in found],
            "seconds_to_first_token": statistics.median(first for _, first in found),
            "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            "peak_bytes": memory.get("peak_bytes_in_use"),
        }
        with options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        if options.trace:
            where_to = options.trace / str(density)
            with jax.profiler.trace(where_to):
                seconds_a_token(model, options.prompt, 24)
            for name, took, calls in kernels(where_to)[:40]:
                print(f"{took:10.0f} us {calls:6d} x  {name[:110]}", flush=True)
        del model


if __name__ == "__main__":
    main()
