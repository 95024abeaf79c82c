"""Calls of the compiled conversions between the forms of an index, and of the full check of one.

`src/conversion.h` and `src/verification.h` say what each one does.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# As in `src/layer.h`.
INDEX_NUMBERS = {"delta8": 0, "mask": 1, "dense": 2}

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class _Planes(ctypes.Structure):
    _fields_ = (
        ("values", _POINTER),
        ("deltas", _POINTER),
        ("primes", _POINTER),
        ("row_pointers", _POINTER),
        ("rows", _SIZE),
        ("columns", _SIZE),
        ("capacity", _SIZE),
        ("index", ctypes.c_int32),
    )


_ARGUMENTS: dict[str, list[type]] = {
    "upg_first_bad_row": [],
    "upg_first_bad_mask_row": [],
    "upg_mask_from_deltas": [_POINTER],
    "upg_deltas_from_mask": [_POINTER],
    "upg_dense_from_deltas": [_SIZE, _SIZE, _POINTER, _POINTER],
    "upg_row_lengths_of_dense": [_SIZE, _SIZE, _POINTER],
    "upg_deltas_from_dense": [_SIZE, _POINTER, _POINTER, _POINTER, _POINTER],
}
# All take the planes, the first row and the end of some rows before that.
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    name: (_SIZE, [_POINTER, _SIZE, _SIZE, *more]) for name, more in _ARGUMENTS.items()
}

# Fewer weights take less time than threads to start.
_WEIGHTS_OF_A_THREAD = 1 << 19


class Conversions:
    """Conversions of one layer's planes.

    Planes are contiguous NumPy arrays of the format's dtypes that pass the structural check; None where a conversion
    does not read one. Results go to arrays of zeros. Row numbers that are returned mean the first row that a conversion
    is impossible for, None that there is none.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        index: str,
        shape: tuple[int, int],
        row_pointers: np.ndarray,
        values: np.ndarray | None = None,
        deltas: np.ndarray | None = None,
        primes: np.ndarray | None = None,
    ) -> None:
        planes = (values, deltas, primes, row_pointers)
        for plane, dtype in zip(planes, (np.int8, np.uint8, np.uint16, np.uint32), strict=True):
            if plane is not None and plane.dtype != dtype:
                raise TypeError(
                    f"conversions: planes must have the format's dtypes; got {plane.dtype} for {dtype}"
                )
        self._arrays = [
            None if plane is None else np.require(plane, requirements=("C", "A")) for plane in planes
        ]
        pointers = [None if plane is None else plane.ctypes.data for plane in self._arrays]
        # Row pointers of a mask's check are held against nothing but themselves.
        capacity = int(row_pointers[-1]) if values is None else values.size
        self._c = library
        self._rows = shape[0]
        self._planes = _Planes(*pointers, *shape, capacity, INDEX_NUMBERS[index])

    def _row(self, function: str, *arguments: int | None) -> int | None:
        """The first row that `function` returns for; threads share the rows."""
        call = getattr(self._c, function)

        def some(first: int, end: int) -> int | None:
            row = call(ctypes.byref(self._planes), first, end, *arguments)
            return None if row == end else row

        threads = min(_usable_cores(), self._rows * self._planes.columns // _WEIGHTS_OF_A_THREAD, self._rows)
        if threads < 2:
            return some(0, self._rows)
        cuts = [self._rows * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(some, cuts[:-1], cuts[1:]))
        return next((row for row in found if row is not None), None)

    def first_bad_row(self) -> int | None:
        """The first row of a layer with deltas that breaks rule 5, 6 or 7 of docs/format.md."""
        return self._row("upg_first_bad_row")

    def first_bad_mask_row(self) -> int | None:
        """The first row with a bit outside the matrix or more bits than entries."""
        return self._row("upg_first_bad_mask_row")

    def mask_from_deltas(self, mask: np.ndarray) -> int | None:
        """Writes the mask of a layer with deltas."""
        return self._row("upg_mask_from_deltas", mask.ctypes.data)

    def deltas_from_mask(self, deltas: np.ndarray) -> int | None:
        """Writes the deltas of a mask."""
        return self._row("upg_deltas_from_mask", deltas.ctypes.data)

    def dense_from_deltas(
        self, stride: int, row_alignment: int, values: np.ndarray, primes: np.ndarray | None
    ) -> int | None:
        """Writes rows of `stride` entries of a layer with deltas."""
        to = None if primes is None else primes.ctypes.data
        return self._row("upg_dense_from_deltas", stride, row_alignment, values.ctypes.data, to)

    def row_lengths_of_dense(self, stride: int, row_alignment: int) -> np.ndarray:
        """How many entries each row has with deltas, uint32."""
        lengths = np.empty(self._rows, np.uint32)
        self._row("upg_row_lengths_of_dense", stride, row_alignment, lengths.ctypes.data)
        return lengths

    def deltas_from_dense(
        self,
        stride: int,
        row_pointers: np.ndarray,
        values: np.ndarray,
        deltas: np.ndarray,
        primes: np.ndarray | None,
    ) -> None:
        """Writes the entries of rows that are dense, where `row_pointers` say."""
        to = None if primes is None else primes.ctypes.data
        self._row(
            "upg_deltas_from_dense",
            *(stride, row_pointers.ctypes.data, values.ctypes.data, deltas.ctypes.data, to),
        )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
