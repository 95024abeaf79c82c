"""`pack` and `unpack`: the same layer with another static `index`, bit for bit convertible."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from upg_jax import _native
from upg_jax._entries import MAX_ENTRIES, EncodedRows, assemble, encode_entries
from upg_jax._errors import FormatError
from upg_jax._index import (
    INDEXES,
    Index,
    deltas_from_mask,
    dense_row_entries,
    mask_from_deltas,
    row_chunks,
    spread_dense,
)
from upg_jax._mdcsr import PLANES, MdCSR, stack
from upg_jax._sparse_dense import _metal_lowering
from upg_jax._sparse_dense._backend import requested_backend
from upg_jax._validate import validate
from upg_jax._values import a_byte_each, as_narrow_as

# The fastest form of a unit layer up to a density, for one vector (`python -m benchmarks.cpu --topics forms`). Only
# VBMI2 expands the values of a mask in one instruction; without it a byte for every column is read faster.
_FASTEST: dict[str, tuple[tuple[float, Index], ...]] = {
    "avx512vbmi2": ((0.18, "delta8"), (0.65, "mask"), (math.inf, "dense")),
}
_FASTEST_ELSEWHERE: tuple[tuple[float, Index], ...] = ((0.25, "delta8"), (math.inf, "dense"))


def pack(layer: MdCSR, index: Index | None = None) -> MdCSR:
    """Re-encodes where a layer's entries are, in the form that multiplies fastest here; runs on the host.

    The result is an `MdCSR` like any other, with another static `index`: it multiplies, differentiates, stacks, decodes
    and saves as before, and `unpack` gives back the bits that came in. With index `"mask"` all planes but
    `delta_indices` are the very arrays of `layer`; with `"dense"` every row holds an entry for each column.

    Args:
        layer: a layer or a stack that passes `validate("full")`; for `"dense"`, with no more end padding than
            `row_alignment` needs, as encoders make it.
        index: `"delta8"`, `"mask"` or `"dense"`; by default what `choose_index` finds fastest.

    Raises:
        FormatError: for a layer that the asked-for form cannot hold, such as one with two entries on one column.
        ValueError: for an unknown `index`, or under a JAX transformation, where planes have no content.
    """
    if index is None:
        index, _ = choose_index(layer)
    if index not in INDEXES:
        raise ValueError(f"pack: index must be one of {INDEXES}; got {index!r}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layer)):
        raise ValueError(
            "pack: needs concrete arrays; it was called under jit, vmap or grad; pack the layer before"
        )
    if layer.index == index:
        return layer
    if {layer.index, index} == {"mask", "dense"}:
        return pack(pack(layer, "delta8"), index)
    if layer.value_bits != 8:
        packed = pack(a_byte_each(jax.tree.map(np.asarray, layer)), index)
        return _like(layer, as_narrow_as(layer, packed, layer.group_scales))
    host = jax.tree.map(np.asarray, layer)
    validate(host, where="pack")
    if "dense" in (layer.index, index):
        return _like(layer, _every_plane(host, index))
    return _like(layer, dataclasses.replace(host, index=index, delta_indices=_only_columns(host, index)))


def unpack(layer: MdCSR) -> MdCSR:
    """Returns the layer with index `"delta8"`, as it was before `pack`.

    Raises:
        FormatError: for a layer that breaks the format.
    """
    return pack(layer, "delta8")


def choose_index(layer: MdCSR) -> tuple[Index, str]:
    """The form in which products with this layer are fastest on this machine, and the reason in words."""
    if layer.value_bits != 8:
        return _narrow_index(layer)
    if _metal_lowering.reads(layer.capacity, requested_backend()):
        return "delta8", "the Metal kernels read deltas"
    if jax.default_backend() in ("gpu", "cuda"):
        return "delta8", "the CUDA kernels read deltas"
    library = _native.load()
    if library is None or requested_backend() == "reference":
        return layer.index, "pure JAX walks every form at about the same speed, so it stays as it is"
    if layer.manifold == "prime":
        return "delta8", "the compiled kernels are fastest with deltas on the prime manifold"
    density = (layer.nnz if layer.index != "dense" else layer.true_nnz) / max(layer.num_weights, 1)
    forms = _FASTEST.get(library.kernels, _FASTEST_ELSEWHERE)
    index = next(index for limit, index in forms if density < limit)
    return index, f"{index} is fastest at density {density:.2f} with the {library.kernels} kernels"


def _narrow_index(layer: MdCSR) -> tuple[Index, str]:
    on_cpu = jax.default_backend() == "cpu" and requested_backend() in ("auto", "native")
    if layer.index == "delta8" and on_cpu and _native.load() is not None:
        return (
            "mask",
            f"the compiled kernels for values of {layer.value_bits} bits read a mask, or dense rows",
        )
    return layer.index, "it has the kernels that there are, and is smallest, as it is"


def _layers(host: MdCSR) -> list[tuple[str, Any]]:
    """The layers of a stack, or a layer by itself, with their names in messages; planes are NumPy arrays."""
    if host.stack_size is None:
        return [("pack", host)]
    layers = range(host.stack_size)
    return [(f"pack: layer {i}", jax.tree.map(lambda leaf, i=i: leaf[i], host)) for i in layers]


def _only_columns(host: MdCSR, index: Index) -> np.ndarray:
    """`delta_indices` as a mask where it holds deltas, and the reverse."""
    converted = []
    for where, one in _layers(host):
        deltas, pointers = one.delta_indices, one.row_pointers
        if index == "mask":
            converted.append(mask_from_deltas(deltas, one.values, pointers, one.shape, where))
        else:
            converted.append(deltas_from_mask(deltas, pointers, one.shape, one.capacity, where))
    if host.stack_size is None:
        return converted[0]
    return np.stack(converted) if converted else np.zeros((0, 0), np.uint8)


def _every_plane(host: MdCSR, index: Index) -> MdCSR:
    """To or from rows of one entry a column."""
    if host.stack_size == 0:
        raise ValueError("pack: needs at least one layer; this stack has none")
    tail = host.capacity - int(host.row_pointers[..., -1].max())  # what no layer of the stack uses
    converted = []
    for where, one in _layers(host):
        cut = one.nnz + tail
        deltas = one.delta_indices[:cut]
        primes = None if one.prime_indices is None else one.prime_indices[:cut]
        one = dataclasses.replace(one, values=one.values[:cut], delta_indices=deltas, prime_indices=primes)
        converted.append(_to_dense(one, where) if index == "dense" else _from_dense(one))
    return converted[0] if host.stack_size is None else stack(converted)


def _to_dense(layer: Any, where: str) -> MdCSR:
    stride = dense_row_entries(layer.in_features, layer.row_alignment)
    tail = layer.capacity - layer.nnz
    if layer.out_features * stride + tail > MAX_ENTRIES:
        raise FormatError(
            f"{where}: a layer holds fewer than 2**31 entries, and index 'dense' needs one for each of "
            f"{layer.out_features:,} x {stride:,}; keep the layer in index {layer.index!r}"
        )
    if (packed := _compiled_to_dense(layer, stride)) is not None:
        return packed

    def spread(plane: np.ndarray) -> np.ndarray:
        if plane[layer.nnz :].any():
            raise FormatError(f"{where}: planes must be zero past the last row's entries")
        dense = spread_dense(
            plane,
            *(layer.delta_indices, layer.values, layer.row_pointers),
            layer.shape,
            layer.row_alignment,
            where,
        )
        return np.concatenate([dense, np.zeros(tail, plane.dtype)]) if tail else dense

    primes = None if layer.prime_indices is None else spread(layer.prime_indices)
    packed = _dense(layer, spread(layer.values), primes, stride)
    # Rows of entries alone do not say where fillers and padding were: only the encoder's places can be found again.
    back = _from_dense(packed)
    for plane in PLANES:
        if not np.array_equal(getattr(layer, plane), getattr(back, plane)):
            raise FormatError(
                f"{where}: index 'dense' holds layers whose fillers, padding and prime indices are as the encoder "
                f"makes them; here {plane} would come back otherwise; keep the layer in index {layer.index!r}"
            )
    return packed


def _dense(layer: MdCSR, values: np.ndarray, primes: np.ndarray | None, stride: int) -> MdCSR:
    return dataclasses.replace(
        layer,
        index="dense",
        values=values,
        delta_indices=np.zeros(0, np.uint8),
        prime_indices=primes,
        row_pointers=np.arange(layer.out_features + 1, dtype=np.uint32) * np.uint32(stride),
    )


def _compiled_to_dense(layer: Any, stride: int) -> MdCSR | None:
    library = _native.load()
    tail = [getattr(layer, plane)[layer.nnz :] for plane in ("values", "delta_indices")]
    if layer.prime_indices is not None:
        tail.append(layer.prime_indices[layer.nnz :])
    if library is None or any(plane.any() for plane in tail):
        return None
    length = layer.out_features * stride + tail[0].size
    values = np.zeros(length, np.int8)
    primes = None if layer.prime_indices is None else np.zeros(length, np.uint16)
    planes = library.conversions(
        "delta8",
        *(layer.shape, layer.row_pointers),
        values=layer.values,
        deltas=layer.delta_indices,
        primes=layer.prime_indices,
    )
    if planes.dense_from_deltas(stride, layer.row_alignment, values, primes) is not None:
        return None
    return _dense(layer, values, primes, stride)


def _compiled_from_dense(layer: Any, stride: int, tail: int) -> MdCSR | None:
    library = _native.load()
    if library is None:
        return None
    planes = library.conversions(
        "dense", layer.shape, layer.row_pointers, values=layer.values, primes=layer.prime_indices
    )
    ends = np.cumsum(planes.row_lengths_of_dense(stride, layer.row_alignment), dtype=np.int64)
    pointers = np.concatenate([[0], ends])
    capacity = int(pointers[-1]) + tail
    if capacity > MAX_ENTRIES:
        return None
    pointers = pointers.astype(np.uint32)
    values, deltas = np.zeros(capacity, np.int8), np.zeros(capacity, np.uint8)
    primes = None if layer.prime_indices is None else np.zeros(capacity, np.uint16)
    planes.deltas_from_dense(stride, pointers, values, deltas, primes)
    return dataclasses.replace(
        layer,
        index="delta8",
        values=values,
        delta_indices=deltas,
        prime_indices=primes,
        row_pointers=pointers,
    )


def _from_dense(layer: Any) -> MdCSR:
    stride = dense_row_entries(layer.in_features, layer.row_alignment)
    tail = layer.capacity - layer.out_features * stride
    if (unpacked := _compiled_from_dense(layer, stride, tail)) is not None:
        return unpacked
    chunks: list[EncodedRows] = []
    for first, last in row_chunks(layer.row_pointers):
        at = slice(first * stride, last * stride)
        values = layer.values[at].reshape(last - first, stride)[:, : layer.in_features]
        rows, columns = np.nonzero(values)
        planes = [values[rows, columns]]
        if layer.prime_indices is not None:
            planes.append(layer.prime_indices[at].reshape(last - first, stride)[rows, columns])
        chunks.append(
            encode_entries(rows, columns, *planes, num_rows=last - first, row_alignment=layer.row_alignment)
        )
    return assemble(
        chunks,
        layer.scales,
        shape=layer.shape,
        manifold=layer.manifold,
        row_alignment=layer.row_alignment,
        dtype=layer.dtype,
        capacity=sum(int(c.row_lengths.sum()) for c in chunks) + tail,
    )


def _like(layer: MdCSR, packed: MdCSR) -> MdCSR:
    """`packed` with `layer`'s own arrays for the planes that stay, and JAX arrays where it has them."""

    def plane(name: str) -> Any:
        old, new = getattr(layer, name), getattr(packed, name)
        if (
            new is None
            or name in ("scales", "group_scales")
            or ("dense" not in (layer.index, packed.index) and name != "delta_indices")
        ):
            return old
        return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new

    return dataclasses.replace(packed, **{name: plane(name) for name in PLANES})
