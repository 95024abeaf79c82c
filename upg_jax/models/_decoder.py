"""The decoder that the families share, as a pure function of a parameter pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._attention import Scores, attend_cached, attend_fresh
from upg_jax.models._cache import KVCache
from upg_jax.models._config import DecoderConfig
from upg_jax.models._embedding import look_up
from upg_jax.models._experts import route
from upg_jax.models._linear import for_each_layer, is_stacked, linear, project, project_together
from upg_jax.models._names import ATTENTION_INPUTS, MLP_INPUTS
from upg_jax.models._rope import rotate
from upg_jax.models._tensor_parallel import placement, replicated, run_on_devices

Params: TypeAlias = dict[str, Any]
"""`embed_tokens (vocab, hidden)`, an array or an `MdCSR` of index `"dense"`; `norm (hidden,)`; `lm_head` (a `Linear`,
absent if tied); and `layers`:

* for each projection its `Linears` (and `NAME.bias (layers, out)`): `q_proj`, `k_proj`, `v_proj`, `o_proj`,
  `gate_proj`, `up_proj`, `down_proj`. Projections that share their input may be one with all rows, named
  `joined(names)`.
* norms `(layers, hidden)`: `attention_norm` and `mlp_norm` of the inputs, and where a family has them
  `attention_post_norm` and `mlp_post_norm` of the outputs, `q_norm` and `k_norm (layers, head_dim)`.
* for a mixture of experts `router (layers, experts, hidden)`, and the MLP's projections as `experts.NAME`, those of all
  experts of the first layer before those of the second."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


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
    x, kv = run_layers(params["layers"], config, embed(params, config, ids), cache, counts=counts)
    if last_only:
        counts = jnp.full(ids.shape[0], ids.shape[1], jnp.int32) if counts is None else counts
        x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    logits = head(params, config, x)
    if kv is not None:
        kv = dataclasses.replace(kv, lengths=replicated(kv.lengths, params["layers"]))
    logits = replicated(logits, params["layers"])
    return (logits[:, 0] if last_only else logits), kv


def embed(params: Params, config: DecoderConfig, ids: jax.Array) -> jax.Array:
    """The residual stream `(batch, tokens, hidden)` of new tokens, before the first layer."""
    dtype = params["norm"].dtype
    x = look_up(params["embed_tokens"], ids).astype(dtype)
    return x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, dtype)


def head(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    """Logits, float32 `(..., vocab)`, of the residual stream after the last layer."""
    weight = params["lm_head"] if "lm_head" in params else params["embed_tokens"]
    logits = linear(_norm(x, params["norm"], config), weight).astype(jnp.float32)
    cap = config.logit_cap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def run_layers(
    layers: Any,
    config: DecoderConfig,
    x: jax.Array,
    cache: KVCache | None = None,
    *,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Takes the residual stream through the decoder's layers, on all devices that they are sharded over.

    Args:
        layers: the `layers` of `Params`.
        config: the model's; see also `DecoderConfig.only`.
        x: `(batch, tokens, hidden)`.
        cache: as for `forward`.
        counts: as for `forward`.

    Returns:
        The stream after the layers, and the cache with the new tokens, None without one.
    """
    if counts is None:
        counts = jnp.full(x.shape[0], x.shape[1], jnp.int32)
    if (where := placement(layers)) is not None:
        return run_on_devices(_run_layers, where, layers, config, x, cache, counts)
    return _run_layers(layers, config, x, cache, counts)


def _run_layers(
    layers: Any, config: DecoderConfig, x: jax.Array, cache: KVCache | None, counts: jax.Array
) -> tuple[jax.Array, KVCache | None]:
    """`run_layers` on one device: of its heads and inner features, if there are more."""
    batch, tokens, _ = x.shape
    chex.assert_shape(counts, (batch,))
    past = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
    chex.assert_shape(past, (batch,))
    positions = past[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    context = tokens if cache is None else cache.capacity
    angles = [kind.rope.angles(positions, context) for kind in config.kinds]
    stacked = is_stacked(layers)

    def normed(name: str, x: jax.Array, layer: Any) -> jax.Array:
        return _norm(x, layers[name][layer], config) if name in layers else x

    def attention(x: jax.Array, layer: Any, kind: int, kv: Any) -> tuple[jax.Array, Any]:
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        sizes = [count * config.head_dim for count in heads]
        q, k, v = (
            y.reshape(batch, tokens, -1, config.head_dim)
            for y in project_together(x, layers, ATTENTION_INPUTS, sizes, layer)
        )
        q, k = (rotate(normed(name, y, layer), *angles[kind]) for name, y in (("q_norm", q), ("k_norm", k)))
        scores = Scores(config.attention_scale, config.attention_cap, config.kinds[kind].window)
        if cache is None:
            out = attend_fresh(q, k, v, positions, scores)
        else:
            at, index = _place(config, layer, kind, stacked)
            held = (kv[0][at], kv[1][at])
            out, held = attend_cached(q, k, v, held, index, past, counts, cache.capacity, scores)
            kv = tuple((*b[:at], new, *b[at + 1 :]) for b, new in zip(kv, held, strict=True))
        return project(out, layers, "o_proj", layer), kv

    def mlp(x: jax.Array, layer: Any) -> jax.Array:
        activation = ACTIVATIONS[config.activation]
        if config.experts:
            return route(x, layers, config, activation, layer)
        gate, up = project_together(x, layers, MLP_INPUTS, [config.intermediate_size] * 2, layer)
        return project(activation(gate) * up, layers, "down_proj", layer)

    def block(layer: Any, kind: int, carry: Any) -> Any:
        x, kv = carry
        y, kv = attention(normed("attention_norm", x, layer), layer, kind, kv)
        x = x + normed("attention_post_norm", y, layer)
        y = mlp(normed("mlp_norm", x, layer), layer)
        return x + normed("mlp_post_norm", y, layer), kv

    kv = None if cache is None else (cache.keys, cache.values)
    x, kv = for_each_layer(block, (x, kv), config.layers, stacked)
    if cache is None or kv is None:
        return x, None
    return x, dataclasses.replace(cache, keys=kv[0], values=kv[1], lengths=past + counts)


def _place(config: DecoderConfig, layer: Any, kind: int, stacked: bool) -> tuple[int, Any]:
    """Where a layer's keys are: which array of the cache, and where in it."""
    if not stacked:
        return layer, 0
    # How many layers of its kind come before each.
    before = [config.layers[:i].count(of) for i, of in enumerate(config.layers)]
    return kind, layer if len(config.kinds) == 1 else jnp.asarray(before, jnp.int32)[layer]


def _norm(x: jax.Array, weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """RMSNorm over the last axis, in float32; rounded to `x`'s dtype once."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = config.norm_offset + weight.astype(jnp.float32)
    return (y * weight.reshape(*[1] * (y.ndim - 1), -1)).astype(x.dtype)
