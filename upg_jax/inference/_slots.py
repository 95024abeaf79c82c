"""A batch whose rows come and go: the device's side of continuous batching."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.inference._logprobs import Chosen
from upg_jax.inference._penalties import History
from upg_jax.inference._rows import replace_row
from upg_jax.inference._sampling import Sampling
from upg_jax.inference._steps import advance, choose
from upg_jax.models import DecoderConfig, KVCache, Params


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Slots:
    """A running batch.

    Attributes:
        tokens: int32 `(slots,)`, each row's newest token.
        done: bool `(slots,)`, rows that are free, or whose answer has ended.
        sampling: the rows' settings.
        stop_ids: int32 `(slots, any)`.
        cache: what the rows have seen.
        history: what they have said.
    """

    tokens: Any
    done: Any
    sampling: Sampling
    stop_ids: Any
    cache: KVCache
    history: History

    @classmethod
    def create(cls, cache: KVCache, vocab_size: int, stop_ids: int) -> Slots:
        """A batch of free rows, with room for as many stop ids in each."""
        rows = cache.batch
        return cls(
            tokens=jnp.zeros(rows, jnp.int32),
            done=jnp.ones(rows, jnp.bool_),
            sampling=jax.tree.map(jnp.asarray, Sampling.create(rows, seed=0)),
            stop_ids=jnp.full((rows, stop_ids), -1, jnp.int32),
            cache=cache,
            history=History(
                prompt=jnp.zeros((rows, vocab_size), jnp.bool_),
                counts=jnp.zeros((rows, vocab_size), jnp.int32),
                bias=jnp.zeros((rows, vocab_size), jnp.float32),
            ),
        )

    def admit(
        self,
        row: int,
        prefilled: KVCache,
        logits: jax.Array,
        sampling: Sampling,
        history: History,
        stop_ids: np.ndarray,
    ) -> tuple[Chosen, Slots]:
        """Puts a sequence whose prompt is computed into a row, and chooses its first token.

        The caches and histories of `self` are donated; the other arguments stay usable.

        Args:
            row: a free one.
            prefilled: the only sequence of a cache of the same capacity.
            logits: float32 `(1, vocab)` after its prompt.
            sampling: its settings.
            history: its prompt.
            stop_ids: int32 `(1, any)`.

        Returns:
            The first token, for one row, and the batch.
        """
        state = (self.tokens, self.done, self.sampling, self.stop_ids)
        one = (prefilled, logits, sampling, history, stop_ids)
        chosen, state, cache, rows = _admit(self.cache, self.history, state, np.int32(row), one)
        tokens, done, sampling, stops = state
        return chosen, Slots(
            tokens=tokens, done=done, sampling=sampling, stop_ids=stops, cache=cache, history=rows
        )

    def step(
        self, params: Params, config: DecoderConfig, asked: frozenset[str] | None
    ) -> tuple[Chosen, Slots]:
        """Chooses each row's next token. The caches and histories of `self` are donated.

        Args:
            params: the decoder's.
            config: the decoder's.
            asked: as in `Sampling`, of all rows that are not free.
        """
        logits, cache = advance(params, config, self.tokens, self.done, self.cache)
        rows = (logits, self.stop_ids, self.tokens, self.done)
        sampling = dataclasses.replace(self.sampling, asked=asked)
        chosen, done, history = choose(*rows, cache.lengths, sampling, self.history)
        return chosen, dataclasses.replace(
            self, tokens=chosen.tokens, done=done, cache=cache, history=history
        )

    def release(self, row: int) -> Slots:
        """Frees a row."""
        return dataclasses.replace(self, done=_release(self.done, np.int32(row)))


@partial(jax.jit, donate_argnames=("cache", "history"))
def _admit(cache: KVCache, history: History, state: Any, row: jax.Array, one: Any) -> Any:
    prefilled, logits, sampling, first_history, stop_ids = one
    nothing = (jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.bool_))
    chosen, ended, said = choose(logits, stop_ids, *nothing, prefilled.lengths, sampling, first_history)
    history = jax.tree.map(lambda rows, new: rows.at[row].set(new[0]), history, said)
    new = (chosen.tokens, ended, sampling, stop_ids)
    state = jax.tree.map(lambda rows, new: rows.at[row].set(new[0]), state, new)
    return chosen, state, replace_row(cache, row, prefilled), history


@jax.jit
def _release(done: jax.Array, row: jax.Array) -> jax.Array:
    return done.at[row].set(True)
