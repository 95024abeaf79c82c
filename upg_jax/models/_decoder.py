"""The decoder that the families share, as a pure function of a parameter pytree."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._attention import attend, attend_cached
from upg_jax.models._cache import KVCache, LayerBuffers, write
from upg_jax.models._config import DecoderConfig
from upg_jax.models._embedding import look_up
from upg_jax.models._linear import for_each_layer, linear, project, project_together
from upg_jax.models._rope import rotate

Params: TypeAlias = dict[str, Any]
"""`embed_tokens (vocab, hidden)`, an array or an `MdCSR` of index `"dense"`; `norm (hidden,)`; `lm_head` (a `Linear`,
absent if tied); and `layers`: for each projection its `Linears` (and `NAME.bias (layers, out)`), and the norms' weights
`(layers, hidden)`. Projections that share their input may be one with all rows, named `joined(names)`."""

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")


def forward(
    params: Params,
    config: DecoderConfig,
    ids: jax.Array,
    cache: KVCache | None = None,
    *,
    counts: jax.Array | None = None,
    last_only: bool = False,
) -> tuple[jax.Array, KVCache | None]:
    """Runs the decoder over new tokens.

    Pure and traceable; differentiable with respect to floating-point leaves. Activations have the dtype of
    `params["norm"]`.

    Args:
        params: see `Params`.
        config: the model's.
        ids: integers `(batch, tokens)`. They continue what the cache holds, or start at position 0 without one.
        cache: what the sequences have seen. Tokens beyond its capacity are not stored: check before.
        counts: int32 `(batch,)`, how many of its row's ids are real; the others are padding at the end, whose
            logits mean nothing. All, if not given.
        last_only: compute the logits of each row's last real token only.

    Returns:
        Logits, float32 `(batch, tokens, vocab)`, or `(batch, vocab)` with `last_only`; and the cache with the new
        tokens, None without one.
    """
    chex.assert_rank(ids, 2)
    x, kv = run_layers(params["layers"], config, embed(params, ids), cache, counts=counts)
    if last_only:
        counts = jnp.full(ids.shape[0], ids.shape[1], jnp.int32) if counts is None else counts
        x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    logits = head(params, config, x)
    return (logits[:, 0] if last_only else logits), kv


def embed(params: Params, ids: jax.Array) -> jax.Array:
    """The residual stream `(batch, tokens, hidden)` of new tokens, before the first layer."""
    return look_up(params["embed_tokens"], ids).astype(params["norm"].dtype)


def head(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    """Logits, float32 `(..., vocab)`, of the residual stream after the last layer."""
    weight = params["lm_head"] if "lm_head" in params else params["embed_tokens"]
    return linear(_norm(x, params["norm"], config), weight).astype(jnp.float32)


def run_layers(
    layers: Any,
    config: DecoderConfig,
    x: jax.Array,
    cache: KVCache | None = None,
    *,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Takes the residual stream through the decoder's layers.

    Args:
        layers: the `layers` of `Params`.
        config: the model's; its `num_layers` layers are run.
        x: `(batch, tokens, hidden)`.
        cache: as for `forward`.
        counts: as for `forward`.

    Returns:
        The stream after the layers, and the cache with the new tokens, None without one.
    """
    batch, tokens, _ = x.shape
    if counts is None:
        counts = jnp.full(batch, tokens, jnp.int32)
    chex.assert_shape(counts, (batch,))
    past = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
    chex.assert_shape(past, (batch,))
    positions = past[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    cos, sin = config.rope.angles(positions, config.head_dim)

    def attention(x: jax.Array, layer: Any, kv: tuple[LayerBuffers, LayerBuffers] | None) -> Any:
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        sizes = [count * config.head_dim for count in heads]
        q, k, v = (
            y.reshape(batch, tokens, -1, config.head_dim)
            for y in project_together(x, layers, ATTENTION_INPUTS, sizes, layer)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None or kv is None:
            out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions)
        else:
            real = jnp.arange(tokens)[None] < counts[:, None]
            targets = jnp.where(real, positions, cache.capacity)
            kv = write(kv[0], layer, k, targets), write(kv[1], layer, v, targets)
            out = attend_cached(q, *kv, layer, positions, jnp.max(past + counts))
        return project(out, layers, "o_proj", layer), kv

    def block(layer: Any, carry: Any) -> Any:
        x, kv = carry
        attended, kv = attention(_norm(x, layers["input_layernorm"][layer], config), layer, kv)
        x = x + attended
        y = _norm(x, layers["post_attention_layernorm"][layer], config)
        gate, up = project_together(y, layers, MLP_INPUTS, [config.intermediate_size] * 2, layer)
        return x + project(jax.nn.silu(gate) * up, layers, "down_proj", layer), kv

    kv = None if cache is None else (cache.keys, cache.values)
    x, kv = for_each_layer(block, (x, kv), layers, config.num_layers)
    if cache is None or kv is None:
        return x, None
    return x, dataclasses.replace(cache, keys=kv[0], values=kv[1], lengths=past + counts)


def _norm(x: jax.Array, weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """RMSNorm in float32, rounded to `x`'s dtype before the weight is applied, as in the original models."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    return y.astype(x.dtype) * weight[None, None]
