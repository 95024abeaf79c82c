"""A prompt's way into a cache of its own, chunk by chunk."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from upg_jax.inference._generate import chunks
from upg_jax.inference._steps import prefill

if TYPE_CHECKING:
    from upg_jax.inference._model import UPGModel


class PromptCache:
    """The prompt that is being computed; what it begins with as the one before is not computed again.

    Attributes:
        cache: of one sequence; with `advance`'s last chunk, all of its prompt.
        logits: float32 `(1, vocab)` after it.
    """

    def __init__(self, model: UPGModel, context: int, chunk: int) -> None:
        self.cache = model.init_cache(1, context)
        self.logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
        self._model = model
        self._chunk = chunk
        self._ids: list[int] = []
        self._taken = 0
        self._left: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque()

    @property
    def complete(self) -> bool:
        """Whether nothing of the prompt is left to compute."""
        return not self._left

    def advance(self, ids: list[int]) -> int:
        """Computes the next chunk of a prompt, if one is left; returns how many tokens that took."""
        if ids != self._ids:
            self._taken = self._kept(ids)
            self._ids = ids
            self._left = collections.deque(chunks([ids[self._taken :]], self._chunk))
            self.cache = dataclasses.replace(self.cache, lengths=jnp.full(1, self._taken, jnp.int32))
        if not self._left:
            return 0
        params, config = self._model.params, self._model.config
        piece, counts = self._left.popleft()
        self.logits, self.cache = prefill(params, config, piece, counts, self.cache, self.logits)
        self._taken += int(counts[0])
        return piece.shape[1]

    def _kept(self, ids: list[int]) -> int:
        """How many tokens need not be computed again: whole chunks, so that results are the same bits as without."""
        if any(self._taken > buffer.shape[-2] for buffer in self.cache.keys):
            return 0  # a sliding window has lost its beginning
        pairs = enumerate(zip(ids[:-1], self._ids[: self._taken], strict=False))
        same = next((at for at, (new, old) in pairs if new != old), min(len(ids) - 1, self._taken))
        return same // self._chunk * self._chunk
