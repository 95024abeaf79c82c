"""The jitted pieces of generation; everything else is bookkeeping on the host.

Each compiles once for a batch size, a cache capacity and (for prefill) a chunk length; all of them come from short
lists, and settings are arrays, so that nothing compiles after a warm-up.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from upg_jax.inference._logprobs import Chosen, recorded
from upg_jax.inference._penalties import History, penalized
from upg_jax.inference._sampling import Sampling, sample
from upg_jax.models import DecoderConfig, KVCache, Params, forward, replicated

CHUNK = 512
_SMALLEST_CHUNK = 16
_SMALLEST_CAPACITY = 128
PROGRAMS = tuple(map(frozenset, ((), ("draws",), ("draws", "top_p"))))


def chunk_length(tokens: int) -> int:
    """The padded length that up to `CHUNK` prompt tokens are computed at: 16, 32, 48, 64, 96, 128, 192, and so on."""
    power = max(_SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
    three_quarters = power * 3 // 4
    return three_quarters if tokens <= three_quarters and three_quarters % _SMALLEST_CHUNK == 0 else power


def cache_capacity(tokens: int) -> int:
    """The capacity that is allocated for `tokens` tokens: 128, 192, 256, 384, 512, 768, and so on."""
    power = max(_SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
    three_quarters = power * 3 // 4
    return three_quarters if max(tokens, _SMALLEST_CAPACITY) <= three_quarters else power


@partial(jax.jit, static_argnames="config")
def run_forward(
    params: Params, config: DecoderConfig, ids: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """`models.forward` with a cache, compiled; the cache that is passed in stays usable."""
    logits, new = forward(params, config, ids, cache)
    assert new is not None
    return logits, new


@partial(jax.jit, static_argnames="config", donate_argnames=("cache", "logits"))
def prefill(
    params: Params,
    config: DecoderConfig,
    ids: jax.Array,
    counts: jax.Array,
    cache: KVCache,
    logits: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Takes in a chunk of each row's prompt.

    Args:
        params: the decoder's.
        config: the decoder's.
        ids: int32 `(batch, chunk)`, padded at the end.
        counts: int32 `(batch,)`, real ids of each row; 0 where the prompt has ended before.
        cache: the rows' caches; donated.
        logits: float32 `(batch, vocab)` of the chunk before, kept where this one has nothing; donated.
    """
    new, filled = forward(params, config, ids, cache, counts=counts, last_only=True)
    assert filled is not None
    return replicated(jnp.where(counts[:, None] > 0, new, logits), params["layers"]), filled


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def advance(
    params: Params, config: DecoderConfig, tokens: jax.Array, done: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Adds each row's newest token to the cache; rows that are done stay as they are.

    Args:
        params: the decoder's.
        config: the decoder's.
        tokens: int32 `(batch,)`, each row's newest token.
        done: bool `(batch,)`, that token ended the row's answer.
        cache: what came before; donated.

    Returns:
        Logits of what follows, float32 `(batch, vocab)`, and the cache.
    """
    counts = (~done).astype(jnp.int32)
    logits, new = forward(params, config, tokens[:, None], cache, counts=counts, last_only=True)
    assert new is not None
    return logits, new


@partial(jax.jit, donate_argnames="history")
def choose(
    logits: jax.Array,
    stop_ids: jax.Array,
    tokens: jax.Array,
    done: jax.Array,
    positions: jax.Array,
    sampling: Sampling,
    history: History,
) -> tuple[Chosen, jax.Array, History]:
    """Chooses a token for each row.

    Args:
        logits: float32 `(batch, vocab)`.
        stop_ids: int32 `(batch, any)`, tokens that end a row's answer, and -1.
        tokens: int32 `(batch,)`, each row's newest token, which those that are done repeat.
        done: bool `(batch,)`, that token ended the row's answer.
        positions: int32 `(batch,)` of the tokens to choose.
        sampling: the rows' settings.
        history: of the rows; donated.

    Returns:
        What was chosen, whether it ends the answers, and the rows' new history (the old one where no row reads it).
    """
    chosen = sample(penalized(logits, sampling, history), sampling, positions)
    if sampling.asked is None or "penalties" in sampling.asked:
        history = history.add(chosen, done)
    ended = done | jnp.any(chosen[:, None] == stop_ids, axis=-1)
    following = dataclasses.replace(
        recorded(logits, chosen, sampling), tokens=jnp.where(done, tokens, chosen)
    )
    return following, ended, history


def narrowed(asked: frozenset[str]) -> frozenset[str] | None:
    """What to compile `choose` for: the common sets of wishes each for itself, and one program for all others."""
    return asked if asked in PROGRAMS else None
