"""A training step on a fixed pattern against the same step on a masked dense matrix.

    python -m benchmarks.training rows.jsonl [--tokens 512 2048] [--densities 0.1 0.3 0.5]

A step is a layer's product, the gradients for its input and its weights, and Adam's change of them. Contenders take
turns; a row is one setting, in seconds. `masked` multiplies by `where(mask, w, 0)`: its gradient and Adam's moments are
dense. `pattern` is `TrainableMdCSR`. `products` is the three dense products alone, the floor of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from upg_jax import MdCSR, TrainableMdCSR, __version__
from upg_jax.cli._measure import quartiles, take_turns

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))


def steps(shape: tuple[int, int], density: float, tokens: int, precision: str) -> dict[str, tuple]:
    """Name -> compiled step, its state, and the other arguments."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    layer = TrainableMdCSR.from_layer(MdCSR.from_dense(w, density=density), precision=precision)
    dense = layer.to_dense()
    mask = dense != 0
    x = jnp.asarray(rng.standard_normal((tokens, shape[1])), jnp.float32)
    g = jnp.asarray(rng.standard_normal((tokens, shape[0])), jnp.float32)
    adam = optax.adam(1e-3)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        x, w = x.astype(precision), w.astype(precision)
        return jnp.einsum("ni,oi->no", x, w, precision="highest", preferred_element_type=jnp.float32)

    def step(apply, w, state, x, g):
        _, pull = jax.vjp(apply, w, x)
        gradient, to_input = pull(g)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(w, updates), state, to_input

    @jax.jit
    def pattern(w, state, x, g, layer):
        return step(lambda w, x: dataclasses.replace(layer, weights=w)(x), w, state, x, g)

    @jax.jit
    def masked(w, state, x, g, mask):
        return step(lambda w, x: product(x, jnp.where(mask, w, 0)), w, state, x, g)

    @jax.jit
    def products(w, state, x, g):
        _, pull = jax.vjp(lambda w, x: product(x, w), w, x)
        return pull(g)

    return {
        "pattern": (pattern, layer.weights, adam.init(layer.weights), x, g, layer),
        "masked": (masked, dense, adam.init(dense), x, g, mask),
        "products": (products, dense, None, x, g),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="results are appended, a JSON object a line")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for shape in SHAPES:
        for tokens in options.tokens:
            for precision in options.precisions:
                for density in options.densities:
                    made = steps(shape, density, tokens, precision)
                    calls = {
                        name: lambda step=step, args=args: jax.block_until_ready(step(*args))
                        for name, (step, *args) in made.items()
                    }
                    seconds = take_turns(calls, options.repeats)
                    state = {
                        name: sum(leaf.nbytes for leaf in jax.tree.leaves((args[0], args[1])))
                        for name, (_, *args) in made.items()
                    }
                    row = {
                        "shape": shape,
                        "density": density,
                        "tokens": tokens,
                        "precision": precision,
                        "median_seconds": {name: quartiles(s)[1] for name, s in seconds.items()},
                        "bytes_of_weights_and_moments": {k: v for k, v in state.items() if k != "products"},
                        "upg_jax": __version__,
                        "jax": jax.__version__,
                        "device": jax.devices()[0].device_kind,
                        "cpu": platform.processor() or platform.machine(),
                    }
                    with options.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
