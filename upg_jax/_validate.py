"""Checks of a layer against docs/format.md: what kernels rely on, and everything else."""

from __future__ import annotations

from typing import Literal

import numpy as np

from upg_jax import _native
from upg_jax._encode import MAX_ENTRIES
from upg_jax._errors import FormatError
from upg_jax._mdcsr import DTYPES, MdCSR
from upg_jax._primes import NUM_PRIMES
from upg_jax._quantize import LARGEST_SCALE, SMALLEST_SCALE

_CHUNK_ENTRIES = 1 << 22


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
    _check_metadata(layer, where)
    _check_planes(layer, where)
    planes = {
        name: np.asarray(getattr(layer, name))
        for name in ("values", "delta_indices", "scales", "row_pointers", "prime_indices")
        if getattr(layer, name) is not None
    }
    if layer.stack_size is None:
        planes = {name: plane[None] for name, plane in planes.items()}
    for i in range(layer.stack_size or 1):
        name = where if layer.stack_size is None else f"{where}, layer {i}"
        one = {plane: array[i] for plane, array in planes.items()}
        _check_row_pointers(layer, one["row_pointers"], name)
        _check_columns(layer, one["row_pointers"], one["delta_indices"], name)
        if level == "full":
            _check_content(layer, one, name)


def _fail(where: str, rule: str) -> None:
    raise FormatError(f"{where}: {rule}")


def _check_metadata(layer: MdCSR, where: str) -> None:
    if len(layer.shape) != 2 or any(not isinstance(n, int) or n < 0 for n in layer.shape):
        _fail(where, f"shape must be two non-negative integers (out, in); got {layer.shape}")
    if max(layer.shape) > MAX_ENTRIES:
        _fail(where, f"shape must stay below 2**31 in each direction; got {layer.shape}")
    alignment = layer.row_alignment
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ENTRIES or alignment & (alignment - 1):
        _fail(where, f"row_alignment must be a power of two below 2**31; got {alignment!r}")
    if layer.dtype not in DTYPES:
        _fail(where, f"dtype must be one of {', '.join(DTYPES)}; got {layer.dtype!r}")
    if layer.index != "delta8" or layer.value_bits != 8:
        _fail(
            where,
            f"this build reads index 'delta8' with value_bits 8; got {layer.index!r} with {layer.value_bits!r}; "
            "upgrade upg_jax",
        )


def _check_planes(layer: MdCSR, where: str) -> None:
    lead = () if layer.stack_size is None else (layer.stack_size,)
    entries = (*lead, layer.capacity)
    expected = {
        "values": (np.int8, entries),
        "delta_indices": (np.uint8, entries),
        "scales": (np.float32, (*lead, layer.out_features)),
        "row_pointers": (np.uint32, (*lead, layer.out_features + 1)),
    }
    if layer.prime_indices is not None:
        expected["prime_indices"] = (np.uint16, entries)
    for name, (dtype, shape) in expected.items():
        plane = getattr(layer, name)
        if plane.dtype != dtype or tuple(plane.shape) != shape:
            _fail(
                where,
                f"{name} must be {np.dtype(dtype)} {shape}; got {plane.dtype} {tuple(plane.shape)}",
            )
    if layer.capacity > MAX_ENTRIES:
        _fail(where, f"a layer holds fewer than 2**31 entries; got planes of {layer.capacity:,}")
    if layer.capacity % layer.row_alignment:
        _fail(
            where, f"plane length {layer.capacity} must be a multiple of row_alignment {layer.row_alignment}"
        )


def _check_row_pointers(layer: MdCSR, pointers: np.ndarray, where: str) -> None:
    if pointers[0] != 0:
        _fail(where, f"row_pointers must start at 0; got {pointers[0]}")
    decreasing = np.flatnonzero(pointers[1:] < pointers[:-1])
    if decreasing.size:
        row = int(decreasing[0])
        _fail(
            where, f"row {row}: row_pointers must not decrease; got {pointers[row]} then {pointers[row + 1]}"
        )
    if pointers[-1] > layer.capacity:
        _fail(where, f"row_pointers end at {pointers[-1]}, past the planes' length {layer.capacity}")
    misaligned = np.flatnonzero(pointers & np.uint32(layer.row_alignment - 1))
    if misaligned.size:
        row = int(misaligned[0])
        _fail(
            where,
            f"row {row}: row_pointers must be multiples of row_alignment {layer.row_alignment}; got {pointers[row]}",
        )


def row_chunks(pointers: np.ndarray) -> list[tuple[int, int]]:
    """Splits rows into ranges of about `_CHUNK_ENTRIES` entries."""
    cuts = np.searchsorted(pointers, np.arange(0, int(pointers[-1]) + 1, _CHUNK_ENTRIES, dtype=np.int64))
    edges = np.unique(np.concatenate([[0], np.minimum(cuts, pointers.size - 1), [pointers.size - 1]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


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
    _fail(
        where,
        f"row {row}: columns must stay below in_features {layer.in_features}; the row's deltas reach column {column}",
    )


def check_scales(scales: np.ndarray, where: str) -> None:
    """Checks one layer's scales, or a stack's; cheap enough for readers to do at every load."""
    with np.errstate(invalid="ignore"):
        good = (scales == 0) | ((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))
    if not good.all():
        at = tuple(np.argwhere(~good)[0].tolist())
        _fail(
            where,
            f"row {at[-1]}: scales must be 0 or in [{SMALLEST_SCALE:.6g}, {LARGEST_SCALE:.6g}]; got {scales[at]}",
        )


def _check_content(layer: MdCSR, planes: dict[str, np.ndarray], where: str) -> None:
    pointers = planes["row_pointers"]
    check_scales(planes["scales"], where)
    for name in ("values", "delta_indices", "prime_indices"):
        tail = planes.get(name, np.zeros(0))[int(pointers[-1]) if name in planes else 0 :]
        if tail.any():
            _fail(where, f"{name} must be zero past the last row's entries, from {pointers[-1]} on")
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
            _fail(where, f"row {row}: columns of stored weights must strictly increase; one repeats")
        if layer.prime_indices is not None:
            k = planes["prime_indices"][begin:end]
            bad = np.flatnonzero(k >= NUM_PRIMES)
            if bad.size:
                _fail(where, f"row {rows[bad[0]]}: prime_indices must be below {NUM_PRIMES}; got {k[bad[0]]}")
            if k[filler].any():
                row = int(rows[filler][np.flatnonzero(k[filler])[0]])
                _fail(where, f"row {row}: a filler's prime index must be 0")


def _check_fillers(rows: np.ndarray, deltas: np.ndarray, filler: np.ndarray, where: str) -> None:
    """Fillers are (0, 255) on the way to a stored weight, or (0, 0) at the end of a row."""
    padding = filler & (deltas == 0)
    leads_on = np.zeros_like(filler)
    leads_on[:-1] = (rows[1:] == rows[:-1]) & ~padding[1:]
    bad = np.flatnonzero(filler & np.where(padding, leads_on, (deltas != 255) | ~leads_on))
    if bad.size:
        _fail(
            where,
            f"row {rows[bad[0]]}: an entry of value 0 must have delta 255 and a stored weight after it, or delta 0 "
            f"at the end of its row; got delta {deltas[bad[0]]}",
        )
