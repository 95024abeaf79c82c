"""`MdCSR`: a compressed weight matrix (or a stack of them) as a JAX pytree."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from upg_jax._index import Index
from upg_jax._values import count_nonzero

Manifold: TypeAlias = Literal["unit", "prime"]
Array: TypeAlias = jax.Array | np.ndarray

MANIFOLDS: tuple[Manifold, ...] = ("unit", "prime")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MdCSR:
    """A pruned, quantized weight matrix in delta-compressed CSR form.

    `W` has shape `(out_features, in_features)` and a layer computes `x @ W.T`; docs/format.md defines the
    planes. The arrays are pytree leaves, everything else is static, so that two layers of one shape and one
    stored length share a compiled program. A *stack* has one more leading axis `S` on every leaf and the same
    static `shape`; `upg_jax.stack` makes it and `sparse_dense(..., index=i)` reads one of its layers in place.

    The constructor stores what it is given (JAX rebuilds pytrees with leaves of any kind); `from_dense` and
    the readers produce valid layers and `validate` checks one.

    Attributes:
        values: int8 `([S,] capacity * value_bits / 8)`, quantized weights; 0 marks a filler entry. Those of fewer than
            8 bits are a little-endian stream of bits.
        delta_indices: uint8, where the entries' columns are. With index `"delta8"`, `([S,] capacity)`: column of
            an entry minus column of the previous one of its row. With `"mask"`, `([S,] out_features * 8 *
            ceil(in_features / 64))`: a bit for each column of a row, set where it has an entry. With `"dense"`,
            `([S,] 0)`: a row's entries are its columns.
        scales: float32 `([S,] out_features)`.
        row_pointers: uint32 `([S,] out_features + 1)`; row `r` owns entries `[row_pointers[r], row_pointers[r + 1])`.
        prime_indices: uint16 `([S,] capacity)` on the prime manifold, None on the unit manifold.
        group_scales: uint8 `([S,] out_features * ceil(in_features / group_size))` with values of fewer than 8 bits,
            else None: what the values of a row are multiplied by, for each group of columns.
        shape: static `(out_features, in_features)`, stacked or not.
        row_alignment: static power of two that every row pointer and the capacity are multiples of.
        dtype: static name of the dtype the weights had, `"float32"`, `"bfloat16"` or `"float16"`.
        index: static name of the column encoding, `"delta8"`, `"mask"` or `"dense"`; `upg_jax.pack` changes it.
        value_bits: static bits of a stored value, 8, or 4 or 3 with multipliers for groups.
        group_size: static columns of a group, 32, 64 or 128; None with values of 8 bits.
    """

    values: Array
    delta_indices: Array
    scales: Array
    row_pointers: Array
    prime_indices: Array | None = None
    group_scales: Array | None = None
    shape: tuple[int, int]
    row_alignment: int = 1
    dtype: str = "float32"
    index: Index = "delta8"
    value_bits: int = 8
    group_size: int | None = None

    @classmethod
    def from_dense(
        cls,
        w: Any,
        *,
        density: float | None = None,
        mask: Any | None = None,
        manifold: Manifold = "unit",
        row_alignment: int | None = None,
        capacity: int | None = None,
        index: Index = "delta8",
        value_bits: int = 8,
        group_size: int | None = None,
    ) -> MdCSR:
        """Prunes, quantizes and encodes a dense matrix; runs on the host.

        Args:
            w: float32, bfloat16, float16 or float64 matrix of shape `(out_features, in_features)`; float64 is
                rounded to float32 first.
            density: fraction of the weights to keep, in `[0, 1]`: the `round(density * w.size)` largest
                magnitudes of the matrix, ties in row-major order. 1.0 (the default) prunes nothing.
            mask: boolean matrix of `w`'s shape, True where a weight is kept; instead of `density`.
            manifold: `"unit"` for symmetric int8 per row (2 bytes an entry), `"prime"` for the prime table's
                finer levels (4 bytes an entry).
            row_alignment: power of two that row lengths are padded to; by default the fewest entries that fill whole
                bytes: 1, or 2 with values of 4 bits and 8 with those of 3.
            capacity: entries to pad the planes to, so that layers of different `nnz` share a compiled program.
            index: how entries find their columns; the result is that of `upg_jax.pack(layer, index)`.
            value_bits: 8, 4 or 3; fewer than 8 on the unit manifold only.
            group_size: columns that share a multiplier with values of fewer than 8 bits: 32, 64 (the default) or 128.

        Returns:
            A layer on JAX's default device. A weight that rounds to 0 is not stored.

        Raises:
            EncodingError: for NaN or infinity (naming row and column), a row too large for the format, or
                arguments that do not fit `w`.
        """
        from upg_jax._encode import encode_dense

        layer = encode_dense(
            w,
            density=density,
            mask=mask,
            manifold=manifold,
            row_alignment=row_alignment,
            capacity=capacity,
            index=index,
            value_bits=value_bits,
            group_size=group_size,
        )
        return jax.device_put(layer)

    def to_dense(self, dtype: Any | None = None) -> jax.Array:
        """Decodes to a dense `([S,] out_features, in_features)` array of `dtype` (default: the original dtype).

        A float32 result has the same bits on every platform; other dtypes round it once.
        """
        from upg_jax._decode import to_dense

        return to_dense(self, dtype)

    def spmv(self, v: Any) -> jax.Array:
        """Returns `W @ v` for a vector `(in_features,)`; the same as `sparse_dense(v, self)`."""
        import chex  # 80 ms to import, which products alone should not wait for

        from upg_jax._sparse_dense import sparse_dense

        chex.assert_rank(v, 1)
        return sparse_dense(v, self)

    def validate(self, level: Literal["structural", "full"] = "structural") -> MdCSR:
        """Checks the layer against docs/format.md and returns it.

        Args:
            level: `"structural"` checks all that could take a kernel out of bounds (shapes, dtypes, row
                pointers, each row's sum of deltas); `"full"` checks every rule.

        Raises:
            FormatError: naming the row and the rule.
        """
        from upg_jax._validate import validate

        validate(self, level)
        return self

    @property
    def manifold(self) -> Manifold:
        """`"prime"` where the layer has prime indices, else `"unit"`."""
        return "unit" if self.prime_indices is None else "prime"

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.shape[1]

    @property
    def stack_size(self) -> int | None:
        """Layers in the stack; None for a single layer."""
        return self.values.shape[0] if self.values.ndim == 2 else None

    @property
    def capacity(self) -> int:
        """Entries that a layer's planes hold, the zero tail included."""
        return self.values.shape[-1] * 8 // self.value_bits

    @property
    def nnz(self) -> int:
        """Entries owned by rows, fillers included, summed over a stack; needs concrete arrays."""
        return int(np.asarray(self.row_pointers)[..., -1].sum(dtype=np.int64))

    @functools.cached_property
    def true_nnz(self) -> int:
        """Entries with a nonzero value, summed over a stack; needs concrete arrays, reads a whole plane."""
        return count_nonzero(np.asarray(self.values), self.value_bits)

    @property
    def density(self) -> float:
        """`true_nnz` over the number of weights; 0.0 for a matrix without weights."""
        return self.true_nnz / max(self.num_weights, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, padding included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all planes, scales, row pointers and padding per weight of the dense matrix."""
        return 8 * self.nbytes / max(self.num_weights, 1)

    @property
    def num_weights(self) -> int:
        """Weights of the dense matrix, summed over a stack."""
        return (self.stack_size or 1) * self.out_features * self.in_features

    def __repr__(self) -> str:
        kind = f"{self.manifold} manifold, {self.dtype}"
        if self.index != "delta8":
            kind += f", index {self.index}"
        if self.value_bits != 8:
            kind += f", {self.value_bits}-bit values in groups of {self.group_size}"
        try:
            size = f"{self.out_features}x{self.in_features}"
            if self.stack_size is not None:
                size = f"{self.stack_size} x [{size}]"
            stored = self.nnz / max(self.num_weights, 1)
            return (
                f"MdCSR({size}, {self.nnz:,} entries ({stored:.1%}), {kind}, "
                f"{self.bits_per_weight:.2f} bits per weight)"
            )
        except (AttributeError, TypeError, IndexError, RuntimeError, jax.errors.JAXTypeError):
            leaves = ", ".join(f"{f}={_describe(getattr(self, f))}" for f in PLANES)
            return f"MdCSR(shape={self.shape}, {kind}, {leaves})"


def _describe(leaf: Any) -> str:
    # The content of an array that was donated, or lies on other hosts, cannot be printed.
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return f"{leaf.dtype}{list(leaf.shape)}" if concrete else repr(leaf)


PLANES = ("values", "delta_indices", "scales", "row_pointers", "prime_indices", "group_scales")
STATIC_FIELDS = ("shape", "row_alignment", "dtype", "index", "value_bits", "group_size")

jax.tree_util.register_dataclass(MdCSR, data_fields=list(PLANES), meta_fields=list(STATIC_FIELDS))


def _metadata_from_json(text: bytes | bytearray) -> tuple[Any, ...]:
    shape, *others = json.loads(text)
    return (tuple(shape), *others)


# Programs saved by `jax.export` may take layers as arguments.
jax.export.register_pytree_node_serialization(
    MdCSR,
    serialized_name="upg_jax.MdCSR",
    serialize_auxdata=lambda metadata: json.dumps(metadata).encode(),
    deserialize_auxdata=_metadata_from_json,
)


def stack(layers: Sequence[MdCSR]) -> MdCSR:
    """Stacks layers of equal metadata on a new leading axis.

    Planes are padded with a zero tail to the longest layer's capacity; that padding counts in
    `bits_per_weight`. Host (NumPy) layers give a host stack, so that nothing passes through a device.

    Args:
        layers: at least one unstacked layer, all with equal `shape`, `manifold`, `row_alignment`, `dtype`, `index`,
            `value_bits` and `group_size`.

    Returns:
        A layer whose leaves have a leading axis of `len(layers)`.

    Raises:
        TypeError: for a layer that is no `MdCSR`.
        ValueError: if there is no layer, one is a stack already, or metadata differ.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("stack: needs at least one layer; got none")
    for i, layer in enumerate(layers):
        if not isinstance(layer, MdCSR):
            raise TypeError(
                f"stack: needs upg_jax.MdCSR layers; layer {i} is a {type(layer).__name__}; stack before shard"
            )
        if layer.stack_size is not None:
            raise ValueError(f"stack: needs unstacked layers; layer {i} is {layer!r}")
        for field in (*STATIC_FIELDS, "manifold"):
            first, this = getattr(layers[0], field), getattr(layer, field)
            if this != first:
                raise ValueError(
                    f"stack: layers must have equal metadata; {field} is {first!r} in layer 0 and {this!r} in "
                    f"layer {i}; keep such layers in a list instead"
                )
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layers))
    xp: Any = np if on_host else jnp

    of_entries = ("values", "delta_indices", "prime_indices")

    def pad_and_stack(plane: str) -> Any:
        leaves = [getattr(layer, plane) for layer in layers]
        # A mask has as many bits in every layer, and with index "dense" nothing stands for columns.
        padded = plane in of_entries and (plane != "delta_indices" or layers[0].index == "delta8")
        length = max(leaf.shape[0] for leaf in leaves) if padded else leaves[0].shape[0]
        return xp.stack([xp.pad(leaf, (0, length - leaf.shape[0])) for leaf in leaves])

    planes = [plane for plane in PLANES if getattr(layers[0], plane) is not None]
    return dataclasses.replace(layers[0], **{plane: pad_and_stack(plane) for plane in planes})
