"""Where each plane of a file goes, so that a memory map of it needs no copying.

Every tensor starts at a multiple of 64 bytes, and one of 16 KiB or more at a multiple of 16 KiB. Zero tails
of planes, while they cost at most 5%, and `__padding__.N` tensors fill what safetensors does not allow to be
holes. The same planes of matrices whose names differ only in integer components
(`model.layers.{i}.mlp.up_proj.weight`, experts) lie side by side at equal lengths where that costs at most
5%, so that a run of them is one contiguous stack; inside a stack of smaller planes, where whole multiples of
16 KiB would cost more, 64 bytes are enough.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from upg_jax._entries import MAX_ENTRIES
from upg_jax._errors import FormatError
from upg_jax._mdcsr import MdCSR
from upg_jax._sharded import ShardedMdCSR
from upg_jax._validate import check_scales, validate
from upg_jax._values import count_nonzero
from upg_jax.io._header import CODE_OF, METADATA_KEY, check_text
from upg_jax.io._metadata import PADDING_PREFIX, MatrixFacts

SMALL_ALIGNMENT = 64
LARGE_ALIGNMENT = 16 * 1024
_NUMBER = re.compile(r"[0-9]{1,9}").fullmatch
_WORTH_PADDING = 1.05  # how much longer planes may become for the sake of alignment and stacking


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One logical tensor, described without holding on to its data.

    Attributes:
        key: its key in the mapping given to `save`.
        index: the layer of a stack that it is, or None.
        facts: the metadata of a compressed matrix, or None for a dense tensor.
        owned: entries that rows own (compressed matrices).
        length: entries each plane is stored with, at least `owned`.
        dtype: safetensors dtype of a dense tensor.
        shape: shape of a dense tensor.
        nbytes: bytes of a dense tensor.
    """

    key: str
    index: int | None = None
    facts: MatrixFacts | None = None
    owned: int = 0
    length: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    nbytes: int = 0

    @property
    def name(self) -> str:
        """The name in the file: the key, with the layer's number in place of `{}`."""
        return self.key if self.index is None else self.key.replace("{}", str(self.index))


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of a file: `offset` counts from the data section; a padding tensor has no `item`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    item: Item | None = None
    plane: str | None = None


def describe(tensors: Mapping[str, Any]) -> list[Item]:
    """Checks every leaf once and returns what is to be stored, in storage order.

    Raises:
        FormatError: for a layer that breaks the format, a leaf of another kind, or names that collide.
    """
    items: list[Item] = []
    for key in tensors:
        items.extend(_describe_leaf(key, tensors[key]))
    check_names(items)
    return arrange(items)


def arrange(items: Iterable[Item]) -> list[Item]:
    """Returns items in storage order, with the lengths that their planes are stored with."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(_group_key(item), []).append(item)
    return [item for group in groups.values() for item in _with_lengths(group)]


def _describe_leaf(key: str, leaf: Any) -> Iterator[Item]:
    where = f"save: tensor {key!r}"
    if not isinstance(key, str):
        raise FormatError(f"{where}: names must be strings")
    if isinstance(leaf, ShardedMdCSR):
        raise FormatError(f"{where}: files hold whole layers; got {leaf!r}; save what its unshard() returns")
    if not isinstance(leaf, MdCSR):
        if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)) or leaf.dtype not in CODE_OF:
            kinds = ", ".join(str(dtype) for dtype in CODE_OF)
            got = getattr(leaf, "dtype", type(leaf).__name__)
            raise FormatError(f"{where}: must be an MdCSR or an array of {kinds}; got {got}")
        code = CODE_OF[np.dtype(leaf.dtype)]
        yield Item(key, dtype=code, shape=tuple(leaf.shape), nbytes=leaf.size * leaf.dtype.itemsize)
        return
    validate(leaf, where=where)
    check_scales(np.asarray(leaf.scales), where)
    if leaf.stack_size is not None and key.count("{}") != 1:
        raise FormatError(
            f"{where}: files hold single layers and this is a stack of {leaf.stack_size}; give a name with "
            "'{}' where each layer's number belongs, e.g. 'model.layers.{}.mlp.up_proj.weight'"
        )
    pointers, values = np.asarray(leaf.row_pointers), np.asarray(leaf.values)
    for index in [None] if leaf.stack_size is None else range(leaf.stack_size):
        at = () if index is None else (index,)
        facts = MatrixFacts(
            shape=leaf.shape,
            manifold=leaf.manifold,
            row_alignment=leaf.row_alignment,
            true_nnz=count_nonzero(values[at], leaf.value_bits),
            index=leaf.index,
            value_bits=leaf.value_bits,
            dtype=leaf.dtype,
            group_size=leaf.group_size,
        )
        yield Item(key, index, facts, owned=int(pointers[(*at, -1)]))


def check_names(items: Iterable[Item]) -> None:
    """Refuses names that the format reserves, and tensors that would need the same name.

    Raises:
        FormatError: naming the tensors.
    """
    stored: dict[str, str] = {}
    for item in items:
        names = [item.name]
        if item.facts is not None:
            names += [f"{item.name}.{plane}" for plane in item.facts.plane_shapes(0)]
        for name in names:
            check_text(name, "save: a tensor's name")
            if name == METADATA_KEY or name.startswith(PADDING_PREFIX):
                raise FormatError(
                    f"save: tensor {name!r}: the name is reserved by the file format; rename it"
                )
            if name in stored:
                raise FormatError(
                    f"save: tensors {stored[name]!r} and {item.name!r}: both need the name {name!r}; rename "
                    "one"
                )
            stored[name] = item.name


def _group_key(item: Item) -> Hashable:
    if item.facts is None:
        return item.name, None
    template = tuple("{}" if _NUMBER(part) else part for part in item.name.split("."))
    return template, dataclasses.replace(item.facts, true_nnz=0)


def _numbers(item: Item) -> list[int]:
    return [int(part) for part in item.name.split(".") if _NUMBER(part)]


def _with_lengths(group: list[Item]) -> list[Item]:
    """Chooses stored lengths: equal ones, in whole large units, as long as the padding stays worth it."""
    facts = group[0].facts
    if facts is None:
        return group
    group = sorted(group, key=_numbers)
    small = max(_entries_in(SMALL_ALIGNMENT, facts.value_bits), facts.row_alignment)
    own = [_round_up(item.owned, small) for item in group]
    for unit in (_large_unit(max(own), facts), small):
        common = _round_up(max(own), max(unit, small))
        if common * len(group) <= _WORTH_PADDING * sum(own):
            own = [common] * len(group)
            break
    for item, length in zip(group, own, strict=True):
        if length > MAX_ENTRIES:
            raise FormatError(
                f"save: tensor {item.name!r}: its {item.owned:,} entries, padded to {length:,}, exceed the "
                f"format's {MAX_ENTRIES:,}; split the matrix"
            )
    return [dataclasses.replace(item, length=length) for item, length in zip(group, own, strict=True)]


def _large_unit(length: int, facts: MatrixFacts) -> int:
    """Entries that a length must be a multiple of, so that large planes end where the next may start."""
    for bits in (facts.value_bits, 8, 16) if facts.manifold == "prime" else (facts.value_bits, 8):
        if length * bits >= 8 * LARGE_ALIGNMENT:
            return _entries_in(LARGE_ALIGNMENT, bits)
    return 1


def _entries_in(nbytes: int, bits: int) -> int:
    """The fewest entries of so many bits that are whole multiples of so many bytes."""
    return 8 * nbytes // math.gcd(8 * nbytes, bits)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def stored_bytes(item: Item) -> int:
    """Bytes of an item in the file, without padding tensors."""
    return sum(placed.nbytes for placed in _tensors_of(item))


def _tensors_of(item: Item) -> Iterator[Placed]:
    if item.facts is None:
        yield Placed(item.name, item.dtype, item.shape, item.nbytes, item=item)
        return
    itemsize = {"I8": 1, "U8": 1, "U16": 2, "U32": 4, "F32": 4}
    for plane, (dtype, shape) in item.facts.plane_shapes(item.length).items():
        yield Placed(f"{item.name}.{plane}", dtype, shape, shape[0] * itemsize[dtype], item=item, plane=plane)


def place(items: Iterable[Item], first_padding: int = 0) -> list[Placed]:
    """Lays tensors out: planes of a group side by side, large tensors first, padding where it is needed.

    Args:
        items: in the order of `describe`.
        first_padding: number of the first padding tensor; names must not repeat among the shards of a model.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(_group_key(item), []).append(item)
    runs = [run for group in groups.values() for run in zip(*map(_tensors_of, group), strict=True)]
    runs.sort(key=lambda run: run[0].nbytes < LARGE_ALIGNMENT)
    placed: list[Placed] = []
    offset = 0
    for run in runs:
        for i, tensor in enumerate(run):
            in_stack = i > 0 and tensor.nbytes == run[i - 1].nbytes
            large = tensor.nbytes >= LARGE_ALIGNMENT and not in_stack
            gap = -offset % (LARGE_ALIGNMENT if large else SMALL_ALIGNMENT) if tensor.nbytes else 0
            if gap:
                placed.append(Placed(f"{PADDING_PREFIX}{first_padding}", "U8", (gap,), gap, offset))
                first_padding += 1
                offset += gap
            placed.append(dataclasses.replace(tensor, offset=offset))
            offset += tensor.nbytes
    return placed


def data_alignment(placed: Iterable[Placed]) -> int:
    """What the data section's start must be a multiple of."""
    return LARGE_ALIGNMENT if any(tensor.nbytes >= LARGE_ALIGNMENT for tensor in placed) else SMALL_ALIGNMENT
