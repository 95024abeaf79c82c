"""A model's forward pass over calibration tokens, block by block, with a stop before every group of projections.

Any family of `upg_jax.models` runs as it is: each projection of a block is replaced by a function, which either
returns an output computed before or notes the input it gets. XLA leaves out whatever the noted input does not depend
on, so that every part of a block is computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.models import DecoderConfig, Weight, embed, head, run_layers

Visit: TypeAlias = Callable[[Sequence[str], Sequence[jax.Array]], Mapping[str, Any]]
"""Given the names of matrices that share their input, and that input in batches `(windows, tokens, features)`: returns
the float32 matrices to go on with."""

_BATCH_TOKENS = 4096


@dataclasses.dataclass
class _Notes:
    """Stands for a projection whose output is not known yet: notes its input."""

    slot: str
    rows: int
    inputs: dict[str, jax.Array]

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        self.inputs[self.slot] = x
        return jnp.zeros((*x.shape[:-1], self.rows), x.dtype)


@dataclasses.dataclass
class _Given:
    """Stands for a projection whose output is known."""

    output: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        return self.output if bias is None else self.output + bias


Others: TypeAlias = dict[str, jax.Array]
Shapes: TypeAlias = tuple[tuple[str, int], ...]


def run_network(
    config: DecoderConfig,
    weights: Sequence[Weight],
    read: Callable[[str], Any],
    ids: np.ndarray,
    visit: Visit,
) -> None:
    """Runs a model over tokens; `visit` sees every group of projections in order and says what they become.

    In memory are the activations of one block, its matrices, and what `read` and `visit` keep.

    Args:
        config: the model's.
        weights: its tensors.
        read: returns what is no projection by its name: the embedding, norms and biases.
        ids: int32 `(windows, tokens)`.
        visit: see `Visit`.
    """
    slots = {weight.slot: weight for weight in weights}
    params = {slot: jnp.asarray(read(slots[slot].name), jnp.float32) for slot in ("embed_tokens", "norm")}
    windows = math.gcd(ids.shape[0], max(1, _BATCH_TOKENS // ids.shape[1]))
    stream = [embed(params, jnp.asarray(batch)) for batch in np.split(ids, ids.shape[0] // windows)]
    del params
    in_layers = [weight for weight in weights if weight.per_layer]
    shapes = tuple((weight.slot, weight.shape[0]) for weight in in_layers if weight.linear)
    one = dataclasses.replace(config, num_layers=1)
    groups: list[list[str]] = []
    for layer in range(config.num_layers):
        names = {weight.slot: weight.name.format(layer=layer) for weight in in_layers}
        others = {
            weight.slot: jnp.asarray(read(names[weight.slot]), jnp.float32)[None]
            for weight in in_layers
            if not weight.linear
        }
        groups = groups or _groups(one, shapes, others, stream[0])
        given: list[dict[str, jax.Array]] = [{} for _ in stream]
        for group in groups:
            inputs = [
                _input_of(others, known, x, config=one, shapes=shapes, slot=group[0])
                for known, x in zip(given, stream, strict=True)
            ]
            matrices = visit([names[slot] for slot in group], inputs)
            for slot in group:
                matrix = jnp.asarray(matrices[names[slot]], jnp.float32)
                for known, x in zip(given, inputs, strict=True):
                    known[slot] = _product(x, matrix)
        stream = [_output_of(others, known, x, config=one) for known, x in zip(given, stream, strict=True)]
    if "lm_head" in slots:
        norm = jnp.asarray(read(slots["norm"].name), jnp.float32)
        visit([slots["lm_head"].name], [_input_of_head(norm, x, config=config) for x in stream])


def _groups(config: DecoderConfig, shapes: Shapes, others: Others, x: jax.Array) -> list[list[str]]:
    """The projections of a block in the order of their use, those of one and the same input together."""
    seen: list[tuple[Any, list[str]]] = []

    class Note(_Notes):
        def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
            if seen and seen[-1][0] is x:
                seen[-1][1].append(self.slot)
            else:
                seen.append((x, [self.slot]))
            return super().__call__(x, bias)

    def block(others: Others, x: jax.Array) -> jax.Array:
        projections = {slot: (Note(slot, rows, {}),) for slot, rows in shapes}
        return run_layers(others | projections, config, x)[0]

    jax.eval_shape(block, others, x)
    return [group for _, group in seen]


@partial(jax.jit, static_argnames=("config", "shapes", "slot"))
def _input_of(
    others: Others, given: Others, x: jax.Array, *, config: DecoderConfig, shapes: Shapes, slot: str
) -> jax.Array:
    inputs: dict[str, jax.Array] = {}
    projections = {
        name: (_Given(given[name]) if name in given else _Notes(name, rows, inputs),) for name, rows in shapes
    }
    run_layers({**others, **projections}, config, x)
    return inputs[slot]


@partial(jax.jit, static_argnames="config")
def _output_of(others: Others, given: Others, x: jax.Array, *, config: DecoderConfig) -> jax.Array:
    return run_layers({**others, **{name: (_Given(y),) for name, y in given.items()}}, config, x)[0]


@partial(jax.jit, static_argnames="config")
def _input_of_head(norm: jax.Array, x: jax.Array, *, config: DecoderConfig) -> jax.Array:
    inputs: dict[str, jax.Array] = {}
    head({"norm": norm, "lm_head": _Notes("lm_head", 1, inputs)}, config, x)
    return inputs["lm_head"]


@jax.jit
def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("bti,oi->bto", x, matrix, precision="highest")
