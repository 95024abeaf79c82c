"""Tokens to train on, in an order that depends on nothing but a seed."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Batches of windows of a text; each pass over it cuts it elsewhere and shuffles the pieces anew.

    Attributes:
        ids: int32 `(tokens,)`, the text.
        window: tokens of a window.
        batch: windows of a batch.
        seed: of cuts and orders.
    """

    ids: np.ndarray
    window: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, np.int32))
        if self.window < 2 or self.batch < 1 or self.ids.ndim != 1 or self.per_pass < self.batch:
            raise ValueError(
                f"TokenWindows: needs windows of at least 2 tokens and a text of a batch of them at least; got "
                f"{self.batch} windows of {self.window} and {self.ids.size} tokens"
            )

    @property
    def per_pass(self) -> int:
        """Whole windows in the text, wherever it is cut."""
        return (self.ids.size - self.window + 1) // self.window

    def __getitem__(self, step: int) -> np.ndarray:
        """Batch number `step`, int32 `(batch, window)`; there is no last one."""
        found = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            turn, at = divmod(number, self.per_pass)
            rng = np.random.default_rng((self.seed, turn))
            start = int(rng.integers(self.window)) + int(rng.permutation(self.per_pass)[at]) * self.window
            found.append(self.ids[start : start + self.window])
        return np.stack(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file's provenance."""
        digest = hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()
        return {
            "tokens": int(self.ids.size),
            "window": self.window,
            "batch": self.batch,
            "seed": self.seed,
            "sha256": digest,
        }
