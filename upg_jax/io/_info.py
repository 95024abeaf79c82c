"""What a file's header says of one tensor."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor.

    Attributes:
        name: name in the original checkpoint.
        kind: `"mdcsr"` or `"dense"`.
        shape: of the dense tensor; `(out_features, in_features)` for a matrix.
        dtype: name of the dense tensor's dtype; the original's for a matrix.
        stored_bytes: bytes in the file, padding tails included.
        manifold: `"unit"` or `"prime"`; None for a dense tensor.
        capacity: entries that a matrix's planes hold, tail included; None for a dense tensor.
        true_nnz: nonzero weights as the metadata claims them (`verify` counts); None for a dense tensor.
        row_alignment: of a matrix; None for a dense tensor.
        index: how a matrix's entries find their columns; None for a dense tensor.
        value_bits: of a matrix's values; None for a dense tensor.
        group_size: columns that share a multiplier; None with values of 8 bits and for a dense tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int
    manifold: str | None = None
    capacity: int | None = None
    true_nnz: int | None = None
    row_alignment: int | None = None
    index: str | None = None
    value_bits: int | None = None
    group_size: int | None = None

    @property
    def num_weights(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, padding included, per element of the dense tensor."""
        return 8 * self.stored_bytes / max(self.num_weights, 1)
