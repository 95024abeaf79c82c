"""Values of fewer than 8 bits (docs/format.md, section 1): their stream of bits, and the layer with a byte an entry.

Everything here is host code on NumPy; `_sparse_dense/_reference.py` reads the stream in place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from upg_jax._mdcsr import MdCSR

VALUE_BITS = (8, 4, 3)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
LARGEST_MULTIPLIER = 255

_OCTET = 8  # entries, which fill whole bytes whatever their bits
_CHUNK_OCTETS = 1 << 17  # bounds temporaries


def smallest_alignment(value_bits: int) -> int:
    """The fewest entries that fill whole bytes: what `row_alignment` must be a multiple of."""
    return 8 // math.gcd(8, value_bits)


def largest_q(value_bits: int) -> int:
    """The largest value that writers produce."""
    return (1 << (value_bits - 1)) - 1


def groups_of(in_features: int, group_size: int | None) -> int:
    """Groups of a row; none where there are no multipliers."""
    return 0 if group_size is None else -(-in_features // group_size)


def value_bytes(entries: int, value_bits: int) -> int:
    """Bytes of the values of so many entries, a multiple of what fills whole bytes."""
    return entries * value_bits // 8


def pack_values(q: np.ndarray, value_bits: int) -> np.ndarray:
    """The stream of values, `(..., entries)` int8 -> `(..., entries * value_bits / 8)` int8."""
    if value_bits == 8:
        return q
    return _by_chunks(functools.partial(_pack, value_bits=value_bits), q, _CHUNK_OCTETS * _OCTET)


def unpack_values(values: np.ndarray, value_bits: int) -> np.ndarray:
    """The values in a stream, a byte each: the reverse of `pack_values`."""
    if value_bits == 8:
        return values
    return _by_chunks(functools.partial(_unpack, value_bits=value_bits), values, _CHUNK_OCTETS * value_bits)


def _by_chunks(convert: Callable[[np.ndarray], np.ndarray], array: np.ndarray, step: int) -> np.ndarray:
    starts = range(0, max(array.shape[-1], 1), step)
    return np.concatenate([convert(array[..., start : start + step]) for start in starts], axis=-1)


def _pack(q: np.ndarray, value_bits: int) -> np.ndarray:
    *lead, entries = q.shape
    octets = -(-entries // _OCTET)
    padded = np.zeros((*lead, octets * _OCTET), np.uint32)
    padded[..., :entries] = q.view(np.uint8)
    padded &= np.uint32((1 << value_bits) - 1)
    words = padded.reshape(*lead, octets, _OCTET)
    words <<= np.arange(0, _OCTET * value_bits, value_bits, dtype=np.uint32)
    joined = np.bitwise_or.reduce(words, axis=-1, keepdims=True).astype("<u4")
    stream = joined.view(np.uint8)[..., :value_bits].reshape(*lead, octets * value_bits)
    return np.ascontiguousarray(stream[..., : value_bytes(entries, value_bits)]).view(np.int8)


def _unpack(values: np.ndarray, value_bits: int) -> np.ndarray:
    *lead, nbytes = values.shape
    entries = nbytes * 8 // value_bits
    octets = -(-entries // _OCTET)
    stream = np.zeros((*lead, octets * value_bits), np.uint8)
    stream[..., :nbytes] = values.view(np.uint8)
    words = np.zeros((*lead, octets, 4), np.uint8)
    words[..., :value_bits] = stream.reshape(*lead, octets, value_bits)
    # To the highest bits of a word, and back with the sign.
    shifts = 32 - value_bits - np.arange(0, _OCTET * value_bits, value_bits, dtype=np.uint32)
    q = (words.view("<u4") << shifts).view(np.int32) >> (32 - value_bits)
    return q.astype(np.int8).reshape(*lead, octets * _OCTET)[..., :entries]


def count_nonzero(values: np.ndarray, value_bits: int) -> int:
    """Nonzero values in a stream."""
    if value_bits == 8:
        return int(np.count_nonzero(values))
    flat, step = values.reshape(-1), _CHUNK_OCTETS * value_bits
    parts = (flat[start : start + step] for start in range(0, flat.size, step))
    return sum(int(np.count_nonzero(_unpack(part, value_bits))) for part in parts)


def a_byte_each(layer: MdCSR) -> MdCSR:
    """The entries of a layer or stack with a byte for each value, without multipliers; planes on the host.

    What says which columns have entries is independent of what they mean, so that host code which moves entries need
    know one form only; `as_narrow_as` goes back.
    """
    if layer.value_bits == 8:
        return layer
    values = unpack_values(np.asarray(layer.values), layer.value_bits)
    return dataclasses.replace(layer, values=values, group_scales=None, value_bits=8, group_size=None)


def as_narrow_as(like: Any, layer: MdCSR, group_scales: Any) -> MdCSR:
    """`layer`, which has a byte for each value, with the bits and groups of `like`, and these multipliers."""
    if like.value_bits == 8:
        return layer
    return dataclasses.replace(
        layer,
        values=pack_values(np.asarray(layer.values), like.value_bits),
        group_scales=group_scales,
        value_bits=like.value_bits,
        group_size=like.group_size,
    )
