"""`TrainableMdCSR`: float weights on the fixed pattern of a compressed layer, to train and encode again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax import _pattern
from upg_jax._encode import checked_group_size
from upg_jax._entries import assemble, encode_chunk
from upg_jax._errors import EncodingError
from upg_jax._index import Index
from upg_jax._mdcsr import Array, Manifold, MdCSR, stack
from upg_jax._primes import prime_table
from upg_jax._quantize import nearest_levels, quantize_entries, scales_of
from upg_jax._quantize_groups import quantize_again
from upg_jax._values import groups_of, largest_q

_TILE_WEIGHTS = 1 << 20
_PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainableMdCSR:
    """The weights of an `MdCSR` in floating point, to train where they are and nowhere else.

    A pytree for `jax.grad`, optax and `jax.lax.scan`; call it to multiply. The product is linear in input and weights,
    with derivatives of every order, forward and reverse. The gradient for the weights is computed for the stored
    positions alone and never dense beyond a tile of rows. Integer leaves have no gradient:

        layer = TrainableMdCSR.from_layer(compressed)
        weights, pattern = upg_jax.partition(layer)
        gradient = jax.grad(lambda w: loss(upg_jax.combine(w, pattern)(x)))(weights)

    Rows are stored in tiles of equal size, a tile's entries in row-major order and then padding, which stays 0. A stack
    of layers has one more leading axis on every leaf; map or scan over it.

    Attributes:
        weights: float32 or bfloat16 `([S,] tiles, width)`, the only leaf that is trained.
        positions: int32 `([S,] tiles, width)`, `row * in_features + column` with rows counted from the tile's first;
            padding counts on from beyond the tile.
        scale_bits: uint32 `([S,] out_features)`, the bits of the scales that the layer had: rows that training left as
            they were get them back.
        shape: static `(out_features, in_features)`.
        precision: static, `"float32"` or `"bfloat16"`: what the factors of products are rounded to. Sums are float32.
        manifold: static, of the layer it was made from, like the following.
        row_alignment: static.
        dtype: static, the original weights'.
        index: static.
        value_bits: static.
        group_size: static.
        group_scales: uint8, the layer's, kept like the scales; None with values of 8 bits.
    """

    weights: Array
    positions: Array
    scale_bits: Array
    shape: tuple[int, int]
    precision: str = "float32"
    manifold: Manifold = "unit"
    row_alignment: int = 1
    dtype: str = "float32"
    index: Index = "delta8"
    value_bits: int = 8
    group_size: int | None = None
    group_scales: Array | None = None

    @classmethod
    def from_layer(
        cls, layer: MdCSR, *, dtype: Any = "float32", precision: str = "float32"
    ) -> TrainableMdCSR:
        """Takes the weights and the pattern of a layer, or of a stack of them; runs on the host.

        Args:
            layer: of any `index` and manifold.
            dtype: of the weights, float32 or bfloat16.
            precision: of products, see the class.

        Raises:
            ValueError: for another dtype or precision.
        """
        if jnp.dtype(dtype).name not in _PRECISIONS or precision not in _PRECISIONS:
            raise ValueError(
                f"TrainableMdCSR.from_layer: dtype and precision must be float32 or bfloat16; got {dtype}, "
                f"{precision}"
            )
        if layer.stack_size is not None:
            one_by_one = [jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(layer.stack_size)]
            return cls.stack([cls.from_layer(one, dtype=dtype, precision=precision) for one in one_by_one])
        rows, columns = layer.shape
        tiles = max(1, min(rows, max(2, -(-rows * columns // _TILE_WEIGHTS))))
        height = _pattern.tile_rows(rows, tiles)
        dense = np.asarray(layer.to_dense(jnp.float32))
        parts = [
            dense[start : start + height].reshape(-1) for start in range(0, tiles * height, max(height, 1))
        ]
        found = [np.flatnonzero(part) for part in parts] or [np.zeros(0, np.int64)]
        width = max(at.size for at in found)
        positions = np.stack([_pad_positions(at, width, height * columns) for at in found])
        weights = np.zeros((tiles, width), np.float32)
        for row, part, at in zip(weights, parts, found, strict=False):
            row[: at.size] = part[at]
        return cls(
            weights=jax.device_put(weights.astype(jnp.dtype(dtype))),
            positions=jax.device_put(positions),
            scale_bits=jnp.asarray(np.asarray(layer.scales).view(np.uint32)),
            shape=layer.shape,
            precision=precision,
            manifold=layer.manifold,
            row_alignment=layer.row_alignment,
            dtype=layer.dtype,
            index=layer.index,
            value_bits=layer.value_bits,
            group_size=layer.group_size,
            group_scales=None if layer.group_scales is None else jnp.asarray(layer.group_scales),
        )

    @staticmethod
    def stack(layers: Sequence[TrainableMdCSR]) -> TrainableMdCSR:
        """Puts layers of equal metadata on a new leading axis, padded to the longest.

        Raises:
            ValueError: if there is no layer, or metadata differ.
        """
        kinds = {jax.tree.structure(layer) for layer in layers}
        if len(kinds) != 1:
            raise ValueError(
                f"TrainableMdCSR.stack: needs layers of equal metadata, at least one; got {len(kinds)} kinds"
            )
        width = max(layer.weights.shape[-1] for layer in layers)

        def padded(layer: TrainableMdCSR) -> TrainableMdCSR:
            missing = width - layer.weights.shape[-1]
            height = _pattern.tile_rows(layer.shape[0], layer.weights.shape[-2])
            beyond = max(height * layer.shape[1], 0) + width
            extra = jnp.broadcast_to(
                jnp.arange(beyond, beyond + missing, dtype=jnp.int32), (*layer.weights.shape[:-1], missing)
            )
            return dataclasses.replace(
                layer,
                weights=jnp.pad(layer.weights, [(0, 0)] * (layer.weights.ndim - 1) + [(0, missing)]),
                positions=jnp.concatenate([layer.positions, extra], axis=-1),
            )

        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(padded, layers))

    def __call__(self, x: Any, bias: Any | None = None) -> jax.Array:
        """`x @ W.T + bias` in `x`'s dtype.

        Args:
            x: `(..., in_features)`, float32, bfloat16 or float16.
            bias: `(out_features,)`.

        Raises:
            ValueError: for another shape, or a stack, whose layers `jax.vmap` and `jax.lax.scan` go over.
        """
        x = jnp.asarray(x)
        if self.weights.ndim != 2 or x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"TrainableMdCSR: x must be (..., in_features={self.shape[1]}) and the layer no stack; got shape "
                f"{x.shape} and weights {self.weights.shape}"
            )
        y = _pattern.contract(
            "y",
            self.weights,
            x.reshape(-1, x.shape[-1]),
            jnp.asarray(self.positions),
            shape=self.shape,
            precision=self.precision,
        ).reshape(*x.shape[:-1], self.shape[0])
        if bias is not None:
            y = y + bias.astype(jnp.float32).reshape(*[1] * (y.ndim - 1), -1)
        return y.astype(x.dtype)

    def rounded(self) -> TrainableMdCSR:
        """The layer with the weights that its scales and multipliers can hold, nearest to what they are.

        Training through it finds weights that lose nothing when they are encoded: `to_mdcsr` of what this returns keeps
        every weight. The gradient passes as if nothing were rounded (Bengio et al., "Estimating or Propagating
        Gradients Through Stochastic Neurons for Conditional Computation", 2013), and is 0 where a weight is clipped.

        Raises:
            ValueError: on the prime manifold, or for a stack, whose layers `jax.vmap` and `jax.lax.scan` go over.
        """
        if self.manifold != "unit" or self.weights.ndim != 2:
            raise ValueError(
                "TrainableMdCSR.rounded: needs a layer on the unit manifold and no stack; got the "
                f"{self.manifold} manifold and weights {self.weights.shape}"
            )
        if self.weights.size == 0:
            return self
        rows, columns = self.shape
        tiles = self.weights.shape[0]
        row, column = jnp.divmod(jnp.asarray(self.positions), columns)
        row = row + jnp.arange(tiles, dtype=row.dtype)[:, None] * _pattern.tile_rows(rows, tiles)
        row = jnp.minimum(row, rows - 1)  # padding
        scales = lax.bitcast_convert_type(jnp.asarray(self.scale_bits), jnp.float32)[row]
        multipliers = jnp.ones_like(scales)
        if self.group_size is not None:
            of_rows = jnp.asarray(self.group_scales).reshape(rows, -1)
            multipliers = of_rows[row, column // self.group_size].astype(jnp.float32)
        steps = scales * multipliers
        divisors = jnp.where(steps > 0, steps, 1)
        limits = divisors * largest_q(self.value_bits)
        inside = jnp.clip(jnp.asarray(self.weights).astype(jnp.float32), -limits, limits)
        # Scales come last, as a decoder has it.
        held = jnp.where(steps > 0, jnp.rint(inside / divisors) * multipliers * scales, 0)
        through = lax.stop_gradient(held) + (inside - lax.stop_gradient(inside))
        return dataclasses.replace(self, weights=through.astype(self.weights.dtype))

    def to_dense(self) -> jax.Array:
        """The dense `(out_features, in_features)` matrix of one layer, in the weights' dtype; differentiable."""
        return _pattern.decode(jnp.asarray(self.weights), jnp.asarray(self.positions), self.shape)

    def to_mdcsr(self, *, manifold: Manifold | None = None, index: Index | None = None) -> MdCSR:
        """Quantizes the weights row by row; runs on the host.

        A row whose float32 weights still are what its old scale and integers make keeps both, so that an untouched
        layer comes back as it was, bit for bit.

        Args:
            manifold: of the result; by default that of the layer it was made from, like `index`.
            index: of the result.

        Raises:
            EncodingError: if a weight is not finite, naming its row, or too large for the format, or for the prime
                manifold of a layer with values of fewer than 8 bits.
        """
        if self.weights.ndim == 3:
            layers = [jax.tree.map(lambda leaf, i=i: leaf[i], self) for i in range(self.weights.shape[0])]
            return stack([layer.to_mdcsr(manifold=manifold, index=index) for layer in layers])
        manifold, index = manifold or self.manifold, index or self.index
        checked_group_size(self.value_bits, self.group_size, manifold, "to_mdcsr")
        rows, columns = self.shape
        weights = np.asarray(self.weights).astype(np.float32)
        height = _pattern.tile_rows(rows, weights.shape[0])
        scales = np.asarray(self.scale_bits).view(np.float32).copy()
        group_scales = np.zeros((rows, groups_of(columns, self.group_size)), np.uint8)
        if self.group_scales is not None:
            group_scales[:] = np.asarray(self.group_scales).reshape(group_scales.shape)
        chunks = []
        for tile, (w, at) in enumerate(zip(weights, np.asarray(self.positions), strict=True)):
            first = min(tile * height, rows)
            size = min(height, rows - first)
            inside = at < size * columns
            w, at = w[inside], at[inside]
            row, column = np.divmod(at, max(columns, 1))
            if not np.isfinite(w).all():
                bad = first + int(row[~np.isfinite(w)][0])
                raise EncodingError(f"to_mdcsr: weights must be finite; row {bad} has one that is not")
            of_tile = slice(first, first + size)
            entries: tuple[np.ndarray, ...]
            if self.group_size is not None:
                dense = np.zeros((size, columns), np.float32)
                dense[row, column] = w
                q, group_scales[of_tile], scales[of_tile] = quantize_again(
                    *(dense, scales[of_tile], group_scales[of_tile]),
                    value_bits=self.value_bits,
                    group_size=self.group_size,
                    first_row=first,
                )
                row, column = np.nonzero(q)
                entries = (row, column, q[row, column])
            else:
                scales[of_tile] = _scales(row, w, scales[of_tile], self.manifold, manifold, first)
                entries, _ = quantize_entries(
                    row, column, w, num_rows=size, manifold=manifold, first_row=first, scales=scales[of_tile]
                )
            chunks.append(encode_chunk(entries, (size, columns), self.row_alignment, index, self.value_bits))
        layer = assemble(
            chunks,
            scales,
            shape=self.shape,
            manifold=manifold,
            row_alignment=self.row_alignment,
            dtype=self.dtype,
            index=index,
            value_bits=self.value_bits,
            group_size=self.group_size,
            group_scales=group_scales,
        )
        return jax.device_put(layer)

    @property
    def nnz(self) -> int:
        """Trained weights, padding apart, summed over a stack; needs concrete arrays."""
        height = _pattern.tile_rows(self.shape[0], self.weights.shape[-2])
        return int(np.count_nonzero(np.asarray(self.positions) < height * self.shape[1]))


jax.tree_util.register_dataclass(
    TrainableMdCSR,
    data_fields=["weights", "positions", "scale_bits", "group_scales"],
    meta_fields=[
        *("shape", "precision", "manifold", "row_alignment", "dtype", "index", "value_bits", "group_size")
    ],
)


def _pad_positions(at: np.ndarray, width: int, end: int) -> np.ndarray:
    # Increasing to the end, as the scatter is told.
    padded = np.arange(end, end + width, dtype=np.int32)
    padded[: at.size] = at
    return padded


def _scales(
    rows: np.ndarray, weights: np.ndarray, old: np.ndarray, old_manifold: str, manifold: Manifold, first: int
) -> np.ndarray:
    """Each row's old scale where it still makes its weights exactly, else the one with which it uses all levels."""
    largest = np.zeros(old.size, np.float32)
    np.maximum.at(largest, rows, np.abs(weights))
    new = scales_of(largest, manifold, first)
    if manifold != old_manifold:
        return new
    with np.errstate(divide="ignore", invalid="ignore"):
        targets = np.where(old[rows] > 0, np.abs(weights).astype(np.float64) / old[rows], 0.0)
    if manifold == "unit":
        levels = np.minimum(np.rint(targets), 127)
    else:
        magnitude, k = nearest_levels(targets)
        levels = magnitude.astype(np.int64) * prime_table().astype(np.int64)[k]
    exact = levels.astype(np.float32) * old[rows] == np.abs(weights)
    changed = np.zeros(old.size, bool)
    changed[rows[~exact]] = True
    return np.where(changed, new, old)
