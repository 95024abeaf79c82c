"""A mixture of experts: each token goes through the few MLPs that a router chooses for it.

Top-k routing with renormalized probabilities: Jiang et al., "Mixtral of Experts" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._config import DecoderConfig
from upg_jax.models._linear import linear, project, project_together
from upg_jax.models._names import EXPERT_INPUTS, EXPERT_OUTPUT

Activation: TypeAlias = Callable[[jax.Array], jax.Array]

_LARGEST_BLOCK = 64


def route(
    x: jax.Array,
    layers: Mapping[str, Any],
    config: DecoderConfig,
    activation: Activation,
    layer: Any,
) -> jax.Array:
    """Computes the chosen experts of each token, and no others.

    Args:
        x: `(batch, tokens, hidden)`.
        layers: the decoder's `layers` parameters.
        config: the model's.
        activation: of the gate.
        layer: index.

    Returns:
        `(batch, tokens, hidden)`: the experts' outputs, weighted by the router's probabilities for them.
    """
    logits = linear(x, layers["router"][layer]).astype(jnp.float32)
    shares, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    if isinstance(layers.get(EXPERT_OUTPUT), tuple) and callable(layers[EXPERT_OUTPUT][0]):
        return _one_by_one(x, layers, shares, chosen, config, activation)
    matrices, first = _of_layer(layers, config.experts, layer)
    places, sources, expert = _blocks(chosen.reshape(-1, config.experts_per_token), config.experts)
    # Places of a block that nobody takes have a zero vector, from the row beyond the last.
    rows = x.reshape(-1, x.shape[-1])
    blocks = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])[sources]
    y = _mlp(blocks, matrices, config, activation, first + expert)
    y = y.reshape(-1, y.shape[-1])[places].reshape(*chosen.shape, -1).astype(jnp.float32)
    return jnp.sum(y * shares[..., None], axis=-2).astype(x.dtype)


def _mlp(
    x: jax.Array, layers: Mapping[str, Any], config: DecoderConfig, activation: Activation, index: Any
) -> jax.Array:
    gate, up = project_together(x, layers, EXPERT_INPUTS, [config.intermediate_size] * 2, index)
    return project(activation(gate) * up, layers, EXPERT_OUTPUT, index)


def _one_by_one(
    x: jax.Array,
    layers: Mapping[str, Any],
    shares: jax.Array,
    chosen: jax.Array,
    config: DecoderConfig,
    activation: Activation,
) -> jax.Array:
    """The same for what stands for matrices: each is given all tokens, as zeros where it was not chosen."""
    out = jnp.zeros(x.shape, jnp.float32)
    for expert in range(config.experts):
        share = jnp.sum(jnp.where(chosen == expert, shares, 0), axis=-1, keepdims=True)
        y = _mlp(jnp.where(share > 0, x, jnp.zeros_like(x)), layers, config, activation, expert)
        out = out + y.astype(jnp.float32) * share
    return out.astype(x.dtype)


def _blocks(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts pairs of a token and an expert into blocks of one expert each; of one pair each where they are few.

    A block is one group of a product with a stack, which reads the expert's matrix once for it.

    Args:
        chosen: int32 `(tokens, per_token)`, the experts of each token.
        experts: how many there are.

    Returns:
        The place of each pair, int32 `(tokens, per_token)`, if the blocks lie in a row; the token in each place, int32
        `(blocks, size)`, the number of tokens where there is none; and each block's expert, int32 `(blocks,)`.
    """
    tokens, per_token = chosen.shape
    pairs = tokens * per_token
    of_pair = chosen.reshape(-1)
    token = jnp.arange(pairs, dtype=jnp.int32) // per_token
    if pairs <= 2 * experts:
        return jnp.arange(pairs, dtype=jnp.int32).reshape(chosen.shape), token[:, None], of_pair
    size = min(_LARGEST_BLOCK, 1 << ((pairs // experts).bit_length() - 1))
    count = pairs // size + experts  # at most: one block of each expert is not full
    mine = of_pair[:, None] == jnp.arange(experts, dtype=jnp.int32)[None]
    before = jnp.cumsum(mine, axis=0, dtype=jnp.int32)
    needed = -(-before[-1] // size)
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    rank = jnp.take_along_axis(before, of_pair[:, None], axis=1)[:, 0] - 1
    places = (ends - needed)[of_pair] * size + rank
    sources = jnp.full(count * size, tokens, jnp.int32).at[places].set(token, unique_indices=True)
    expert = jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right").astype(jnp.int32)
    return places.reshape(chosen.shape), sources.reshape(count, size), jnp.minimum(expert, experts - 1)


def _of_layer(layers: Mapping[str, Any], experts: int, layer: Any) -> tuple[dict[str, Any], Any]:
    """The experts' matrices, and the number of the layer's first among them."""
    names = [name for name in layers if name.startswith("experts.")]
    if not any(isinstance(layers[name], tuple) for name in names):
        return {name: layers[name] for name in names}, layer * experts
    first = layer * experts
    return {name: _one_layer(layers[name], first, experts) for name in names}, 0


def _one_layer(weights: Any, first: int, experts: int) -> Any:
    if isinstance(weights, tuple):
        return weights[first : first + experts]
    return jax.tree.map(lambda plane: plane[first : first + experts], weights)
