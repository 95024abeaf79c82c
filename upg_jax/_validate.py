"""Checks of a layer against docs/format.md: what kernels rely on, and everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from upg_jax import _native
from upg_jax._index import (
    deltas_from_mask,
    dense_row_entries,
    first_row_outside_mask,
    is_good_mask,
    mask_counts,
    row_chunks,
    row_lengths,
)
from upg_jax._mdcsr import PLANES, MdCSR
from upg_jax._primes import NUM_PRIMES
from upg_jax._quantize import LARGEST_SCALE, SMALLEST_SCALE
from upg_jax._validate_planes import check_metadata, check_planes, fail
from upg_jax._values import groups_of, unpack_values


def validate(
    layer: MdCSR, level: Literal["structural", "full"] = "structural", *, where: str = "MdCSR"
) -> None:
    """Checks a layer or every layer of a stack; needs concrete arrays.

    Args:
        layer: the layer; its planes may be memory-mapped.
        level: `"structural"` for all that could take a kernel out of bounds, `"full"` for every rule.
        where: what to call the layer in messages, e.g. file and tensor name.

    Raises:
        FormatError: naming the row and the rule that is broken.
    """
    if level not in ("structural", "full"):
        raise ValueError(f"validate: level must be 'structural' or 'full'; got {level!r}")
    check_sizes(layer, where)
    for name, one in _each(layer, PLANES, where):
        _COLUMN_CHECKS[layer.index](layer, one["row_pointers"], one["delta_indices"], name)
        if level == "full":
            _check_content(layer, one, name)


def check_sizes(layer: MdCSR, where: str) -> None:
    """Checks all but what is in the entries: shapes, dtypes and row pointers."""
    check_metadata(layer, where)
    check_planes(layer, where)
    for name, one in _each(layer, ["row_pointers"], where):
        _check_row_pointers(layer, one["row_pointers"], name)


def _each(layer: MdCSR, names: Sequence[str], where: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """What to call each layer of a stack, or a layer alone, and its planes."""
    planes = {name: np.asarray(getattr(layer, name)) for name in names if getattr(layer, name) is not None}
    if layer.stack_size is None:
        yield where, planes
        return
    for i in range(layer.stack_size):
        yield f"{where}, layer {i}", {name: plane[i] for name, plane in planes.items()}


def _check_row_pointers(layer: MdCSR, pointers: np.ndarray, where: str) -> None:
    if pointers[0] != 0:
        fail(where, f"row_pointers must start at 0; got {pointers[0]}")
    decreasing = np.flatnonzero(pointers[1:] < pointers[:-1])
    if decreasing.size:
        row = int(decreasing[0])
        fail(
            where, f"row {row}: row_pointers must not decrease; got {pointers[row]} then {pointers[row + 1]}"
        )
    if pointers[-1] > layer.capacity:
        fail(where, f"row_pointers end at {pointers[-1]}, past the planes' length {layer.capacity}")
    misaligned = np.flatnonzero(pointers & np.uint32(layer.row_alignment - 1))
    if misaligned.size:
        row = int(misaligned[0])
        fail(
            where,
            f"row {row}: row_pointers must be multiples of row_alignment {layer.row_alignment}; got {pointers[row]}",
        )


def _check_columns(layer: MdCSR, pointers: np.ndarray, deltas: np.ndarray, where: str) -> None:
    """Deltas are non-negative, so a row stays inside the matrix when its last column does."""
    if (library := _native.load()) is not None:
        row = library.first_row_outside(deltas, pointers, layer.in_features)
        if row is not None:
            last = deltas[pointers[row] : pointers[row + 1]].sum(dtype=np.int64)
            _fail_column(layer, row, last, where)
        return
    for first, last in row_chunks(pointers):
        begin, end = int(pointers[first]), int(pointers[last])
        if begin == end:
            continue
        starts = pointers[first:last].astype(np.int64) - begin
        occupied = np.flatnonzero(pointers[first + 1 : last + 1] > pointers[first:last])
        # Twice as fast in 32 bits, which hold the sum of any chunk but one of a single enormous row.
        width = np.uint32 if (end - begin) * 255 < 2**32 else np.int64
        last_column = np.add.reduceat(deltas[begin:end], starts[occupied], dtype=width)
        outside = np.flatnonzero(last_column >= layer.in_features)
        if outside.size:
            row = first + int(occupied[outside[0]])
            _fail_column(layer, row, last_column[outside[0]], where)


def _fail_column(layer: MdCSR, row: int, column: int, where: str) -> None:
    fail(
        where,
        f"row {row}: columns must stay below in_features {layer.in_features}; the row's deltas reach column {column}",
    )


def _check_mask(layer: MdCSR, pointers: np.ndarray, mask: np.ndarray, where: str) -> None:
    if is_good_mask(mask, pointers, layer.shape):
        return
    row = first_row_outside_mask(mask, layer.shape)
    if row is not None:
        fail(
            where,
            f"row {row}: columns must stay below in_features {layer.in_features}; its mask has later ones",
        )
    lengths, counts = row_lengths(pointers), mask_counts(mask, layer.shape)
    too_many = np.flatnonzero(counts > lengths)
    if too_many.size:
        row = int(too_many[0])
        fail(
            where,
            f"row {row}: a row's mask has at most one bit an entry; got {counts[row]} bits for {lengths[row]} entries",
        )


def _check_dense(layer: MdCSR, pointers: np.ndarray, _: np.ndarray, where: str) -> None:
    stride = dense_row_entries(layer.in_features, layer.row_alignment)
    wrong = np.flatnonzero(row_lengths(pointers) != stride)
    if wrong.size:
        row = int(wrong[0])
        fail(
            where,
            f"row {row}: every row must have {stride} entries with index 'dense'; got {row_lengths(pointers)[row]}",
        )


_COLUMN_CHECKS = {"delta8": _check_columns, "mask": _check_mask, "dense": _check_dense}


def check_scales(scales: np.ndarray, where: str) -> None:
    """Checks one layer's scales, or a stack's; cheap enough for readers to do at every load."""
    with np.errstate(invalid="ignore"):
        good = (scales == 0) | ((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))
    if not good.all():
        at = tuple(np.argwhere(~good)[0].tolist())
        fail(
            where,
            f"row {at[-1]}: scales must be 0 or in [{SMALLEST_SCALE:.6g}, {LARGEST_SCALE:.6g}]; got {scales[at]}",
        )


def _check_content(layer: MdCSR, planes: dict[str, np.ndarray], where: str) -> None:
    pointers = planes["row_pointers"]
    check_scales(planes["scales"], where)
    if layer.group_size is not None:
        _check_group_scales(layer, planes["group_scales"], where)
        planes = planes | {"values": unpack_values(planes["values"], layer.value_bits)}
    if layer.index == "mask":
        deltas = deltas_from_mask(planes["delta_indices"], pointers, layer.shape, layer.capacity, where)
        _check_entries_without_bits(layer, planes, where)
        planes = planes | {"delta_indices": deltas}
    for name in ("values", "delta_indices", "prime_indices"):
        tail = planes.get(name, np.zeros(0))[int(pointers[-1]) if name in planes else 0 :]
        if tail.any():
            fail(where, f"{name} must be zero past the last row's entries, from {pointers[-1]} on")
    if layer.index == "dense":
        _check_dense_content(layer, planes, where)
        return
    if _has_good_rows(layer, planes):
        return
    for first, last in row_chunks(pointers):
        begin, end = int(pointers[first]), int(pointers[last])
        lengths = pointers[first + 1 : last + 1].astype(np.int64) - pointers[first:last]
        rows = np.repeat(np.arange(first, last), lengths)
        deltas, values = planes["delta_indices"][begin:end], planes["values"][begin:end]
        filler = values == 0
        _check_fillers(rows, deltas, filler, where)
        running = np.cumsum(deltas, dtype=np.int64)
        stored = np.flatnonzero(~filler)
        same_row = rows[stored[1:]] == rows[stored[:-1]]
        repeats = same_row & (running[stored[1:]] == running[stored[:-1]])
        if repeats.any():
            row = int(rows[stored[1:]][repeats][0])
            fail(where, f"row {row}: columns of stored weights must strictly increase; one repeats")
        if layer.prime_indices is not None:
            k = planes["prime_indices"][begin:end]
            _check_primes(rows, k, filler & (k != 0), where)


def _check_group_scales(layer: MdCSR, multipliers: np.ndarray, where: str) -> None:
    if (zero := np.flatnonzero(multipliers == 0)).size:
        row, group = divmod(int(zero[0]), groups_of(layer.in_features, layer.group_size))
        fail(where, f"row {row}: group_scales must be 1 to 255; that of group {group} is 0")


def _has_good_rows(layer: MdCSR, planes: dict[str, np.ndarray]) -> bool:
    """Whether the compiled check finds no fault; False without it. NumPy then says which."""
    library = _native.load()
    if library is None:
        return False
    checks = library.conversions(
        "delta8",
        layer.shape,
        planes["row_pointers"],
        values=planes["values"],
        deltas=planes["delta_indices"],
        primes=planes.get("prime_indices"),
    )
    return checks.first_bad_row() is None


def _check_entries_without_bits(layer: MdCSR, planes: dict[str, np.ndarray], where: str) -> None:
    pointers = planes["row_pointers"].astype(np.int64)
    used = pointers[:-1] + mask_counts(planes["delta_indices"], layer.shape)
    for row in np.flatnonzero(used < pointers[1:]).tolist():
        if planes["values"][used[row] : pointers[row + 1]].any():
            fail(where, f"row {row}: an entry without a bit in the row's mask must have value 0")


def _check_dense_content(layer: MdCSR, planes: dict[str, np.ndarray], where: str) -> None:
    stride = dense_row_entries(layer.in_features, layer.row_alignment)
    for first, last in row_chunks(planes["row_pointers"]):
        values = planes["values"][first * stride : last * stride].reshape(last - first, stride)
        beyond = values[:, layer.in_features :].any(axis=1)
        if beyond.any():
            fail(
                where,
                f"row {first + int(np.argmax(beyond))}: an entry past the last column must have value 0",
            )
        if layer.prime_indices is not None:
            k = planes["prime_indices"][first * stride : last * stride].reshape(values.shape)
            _check_primes(
                np.arange(first, last), k.max(axis=1, initial=0), (k * (values == 0)).any(axis=1), where
            )


def _check_primes(rows: np.ndarray, k: np.ndarray, of_fillers: np.ndarray, where: str) -> None:
    bad = np.flatnonzero(k >= NUM_PRIMES)
    if bad.size:
        fail(where, f"row {rows[bad[0]]}: prime_indices must be below {NUM_PRIMES}; got {k[bad[0]]}")
    if of_fillers.any():
        fail(where, f"row {rows[np.argmax(of_fillers)]}: a filler's prime index must be 0")


def _check_fillers(rows: np.ndarray, deltas: np.ndarray, filler: np.ndarray, where: str) -> None:
    """Fillers are (0, 255) on the way to a weight in a later column, or (0, 0) at the end of a row."""
    padding = filler & (deltas == 0)
    leads_on = np.zeros_like(filler)
    leads_on[:-1] = (rows[1:] == rows[:-1]) & np.where(padding[:-1], ~padding[1:], deltas[1:] != 0)
    bad = np.flatnonzero(filler & np.where(padding, leads_on, (deltas != 255) | ~leads_on))
    if bad.size:
        fail(
            where,
            f"row {rows[bad[0]]}: an entry of value 0 must have delta 255 and a stored weight after it, in a "
            f"later column, or delta 0 at the end of its row; got delta {deltas[bad[0]]}",
        )
