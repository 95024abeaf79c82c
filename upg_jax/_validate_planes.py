"""Checks of a layer's static fields and of its planes' dtypes and shapes, before anything reads their content."""

from __future__ import annotations

import numpy as np

from upg_jax._entries import MAX_ENTRIES
from upg_jax._errors import FormatError
from upg_jax._index import INDEXES, index_bytes
from upg_jax._mdcsr import DTYPES, MdCSR
from upg_jax._values import GROUP_SIZES, VALUE_BITS, groups_of, smallest_alignment, value_bytes


def fail(where: str, rule: str) -> None:
    """Raises `FormatError`."""
    raise FormatError(f"{where}: {rule}")


def check_metadata(layer: MdCSR, where: str) -> None:
    """Checks what is static about a layer."""
    if len(layer.shape) != 2 or any(not isinstance(n, int) or n < 0 for n in layer.shape):
        fail(where, f"shape must be two non-negative integers (out, in); got {layer.shape}")
    if max(layer.shape) > MAX_ENTRIES:
        fail(where, f"shape must stay below 2**31 in each direction; got {layer.shape}")
    alignment = layer.row_alignment
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ENTRIES or alignment & (alignment - 1):
        fail(where, f"row_alignment must be a power of two below 2**31; got {alignment!r}")
    if layer.dtype not in DTYPES:
        fail(where, f"dtype must be one of {', '.join(DTYPES)}; got {layer.dtype!r}")
    if layer.index not in INDEXES or layer.value_bits not in VALUE_BITS:
        fail(
            where,
            f"this build reads index {', '.join(map(repr, INDEXES))} with value_bits "
            f"{', '.join(map(str, VALUE_BITS))}; got {layer.index!r} with {layer.value_bits!r}; upgrade upg_jax",
        )
    _check_value_bits(layer, where)


def _check_value_bits(layer: MdCSR, where: str) -> None:
    bits, least = layer.value_bits, smallest_alignment(layer.value_bits)
    sizes = (None,) if bits == 8 else GROUP_SIZES
    if layer.group_size not in sizes:
        fail(
            where,
            f"group_size must be {' or '.join(map(str, sizes))} with value_bits {bits}; got {layer.group_size!r}",
        )
    if (layer.group_scales is None) != (bits == 8):
        fail(
            where, f"group_scales must be there with value_bits 4 or 3, and only then; got value_bits {bits}"
        )
    if bits != 8 and layer.prime_indices is not None:
        fail(where, f"the prime manifold has value_bits 8; got {bits}")
    if layer.row_alignment < least:
        fail(
            where,
            f"row_alignment must be at least {least} with value_bits {bits}, so that rows fill whole bytes; got "
            f"{layer.row_alignment}",
        )


def check_planes(layer: MdCSR, where: str) -> None:
    """Checks dtypes and shapes."""
    lead = () if layer.stack_size is None else (layer.stack_size,)
    entries = (*lead, layer.capacity)
    expected = {
        "values": (np.int8, (*lead, value_bytes(layer.capacity, layer.value_bits))),
        "delta_indices": (np.uint8, (*lead, index_bytes(layer.index, layer.shape, layer.capacity))),
        "scales": (np.float32, (*lead, layer.out_features)),
        "row_pointers": (np.uint32, (*lead, layer.out_features + 1)),
    }
    if layer.prime_indices is not None:
        expected["prime_indices"] = (np.uint16, entries)
    if layer.group_scales is not None:
        groups = layer.out_features * groups_of(layer.in_features, layer.group_size)
        expected["group_scales"] = (np.uint8, (*lead, groups))
    for name, (dtype, shape) in expected.items():
        plane = getattr(layer, name)
        if plane.dtype != dtype or tuple(plane.shape) != shape:
            fail(
                where,
                f"{name} must be {np.dtype(dtype)} {shape}; got {plane.dtype} {tuple(plane.shape)}",
            )
    if layer.capacity > MAX_ENTRIES:
        fail(where, f"a layer holds fewer than 2**31 entries; got planes of {layer.capacity:,}")
    if layer.capacity % layer.row_alignment:
        fail(
            where, f"plane length {layer.capacity} must be a multiple of row_alignment {layer.row_alignment}"
        )
