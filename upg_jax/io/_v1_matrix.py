"""One sparse matrix of a version 1 file: checked, and re-encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from upg_jax._entries import MAX_ENTRIES, EncodedRows, assemble, encode_entries
from upg_jax._errors import EncodingError, FormatError
from upg_jax._index import row_chunks
from upg_jax._mdcsr import Manifold, MdCSR
from upg_jax._primes import NUM_PRIMES, prime_table
from upg_jax._quantize import quantize_entries
from upg_jax._validate import check_scales
from upg_jax.io._pickle_values import PickledArray, PickledCSR, describe


class Entries(NamedTuple):
    """The nonzero entries of some rows; `rows` count from the first of them."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    primes: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class V1Matrix:
    """A sparse matrix with its planes as a version 1 file holds them; checked by whoever makes it.

    Attributes:
        where: file and tensor, for messages.
        shape: `(out_features, in_features)`.
        values: int8 weights, or floats that are still to be quantized.
        columns: absolute columns, or deltas, one for each value.
        is_delta: whether `columns` are deltas.
        pointers: int64 `(out_features + 1,)`.
        scales: float32 `(out_features,)`; None where values are floats.
        primes: indices into the prime table, or None.
        manifold: what it is to be encoded to.
        dtype: name of the original dtype.
    """

    where: str
    shape: tuple[int, int]
    values: np.ndarray
    columns: np.ndarray
    is_delta: bool
    pointers: np.ndarray
    scales: np.ndarray | None
    primes: np.ndarray | None
    manifold: Manifold
    dtype: str

    def __post_init__(self) -> None:
        length = self.values.shape[0]
        for name, plane in (("columns", self.columns), ("prime_indices", self.primes)):
            if plane is not None and plane.shape[0] != length:
                self.fail(f"there must be as many {name} as values; got {plane.shape[0]:,} and {length:,}")
        first, last = self.pointers[0], self.pointers[-1]
        if first != 0 or last != length:
            self.fail(f"row pointers must go from 0 to the {length:,} values; got {first} to {last}")
        decreasing = np.flatnonzero(self.pointers[1:] < self.pointers[:-1])
        if decreasing.size:
            self.fail(f"row {decreasing[0]}: row pointers must not decrease")
        if self.scales is not None:
            check_scales(self.scales, self.where)

    @classmethod
    def from_dict(cls, entry: dict[Any, Any], where: str) -> V1Matrix:
        """Reads a dict of planes.

        Raises:
            FormatError: naming the tensor and the rule that is broken.
        """
        shape = _shape(entry.get("shape"), where)
        pointers = _pointers(entry, _one_of(entry, "row_pointers", "indptr", where), shape[0], where)
        column_key = _one_of(entry, "indices", "delta_indices", where)
        is_delta = column_key == "delta_indices"
        has_primes = entry.get("prime_indices") is not None
        return cls(
            where=where,
            shape=shape,
            values=_array(entry, "values", "int8", where),
            columns=_array(entry, column_key, "uint8" if is_delta else "integers", where),
            is_delta=is_delta,
            pointers=pointers,
            scales=_scales(entry.get("scales"), shape[0], where),
            primes=_array(entry, "prime_indices", "integers", where) if has_primes else None,
            manifold="prime" if has_primes else "unit",
            dtype="float32",
        )

    @classmethod
    def from_scipy(cls, matrix: PickledCSR, manifold: Manifold, where: str) -> V1Matrix:
        """Reads a scipy CSR matrix: int8 as it is, with scale 1; floats to be quantized.

        Raises:
            FormatError: naming the tensor and the rule that is broken.
        """
        state = matrix.state
        shape = _shape(state.get("_shape", state.get("shape")), where)
        pointers = _pointers(state, "indptr", shape[0], where)
        values = _array(state, "data", "int8 or floats", where)
        is_float = values.dtype.kind == "f"
        return cls(
            where=where,
            shape=shape,
            values=values,
            columns=_array(state, "indices", "integers", where),
            is_delta=False,
            pointers=pointers,
            scales=None if is_float else np.ones(shape[0], np.float32),
            primes=None,
            manifold=manifold if is_float else "unit",
            dtype="float16" if values.dtype == np.float16 else "float32",
        )

    def fail(self, rule: str) -> NoReturn:
        """Raises the error of a rule that this tensor breaks."""
        raise FormatError(f"{self.where}: {rule}")

    def entries(self, first: int, last: int) -> Entries:
        """Returns the nonzero entries of rows `[first, last)` in absolute columns, checked."""
        begin, end = int(self.pointers[first]), int(self.pointers[last])
        lengths = np.diff(self.pointers[first : last + 1])
        rows = np.repeat(np.arange(last - first), lengths)
        columns = self.columns[begin:end].astype(np.int64)
        if self.is_delta:
            columns = np.cumsum(columns)
            before = np.concatenate([[0], columns])[self.pointers[first:last] - begin]
            columns -= np.repeat(before, lengths)
        outside = np.flatnonzero((columns < 0) | (columns >= self.shape[1]))
        if outside.size:
            row, column = first + rows[outside[0]], columns[outside[0]]
            self.fail(f"row {row}: columns must be in [0, {self.shape[1]}); got {column}")
        stored = np.flatnonzero(self.values[begin:end])
        rows, columns, values = rows[stored], columns[stored], self.values[begin:end][stored]
        unsorted = np.flatnonzero((rows[1:] == rows[:-1]) & (columns[1:] <= columns[:-1]))
        if unsorted.size:
            i = int(unsorted[0])
            self.fail(
                f"row {first + rows[i]}: columns of stored weights must strictly increase; got {columns[i]} "
                f"then {columns[i + 1]}"
            )
        if self.primes is None:
            return Entries(rows, columns, values, None)
        primes = self.primes[begin:end][stored]
        bad = np.flatnonzero((primes < 0) | (primes >= NUM_PRIMES))
        if bad.size:
            row = first + rows[bad[0]]
            self.fail(f"row {row}: prime_indices must be in [0, {NUM_PRIMES}); got {primes[bad[0]]}")
        return Entries(rows, columns, values, primes.astype(np.uint16))

    def weights(self, entries: Entries, first: int) -> np.ndarray:
        """Decodes entries to float32 weights."""
        if self.scales is None:
            with np.errstate(over="ignore"):
                weights = entries.values.astype(np.float32)
            bad = np.flatnonzero(~np.isfinite(weights))
            if bad.size:
                row, column = first + entries.rows[bad[0]], entries.columns[bad[0]]
                self.fail(
                    f"row {row}, column {column}: weights must be finite in float32; got {weights[bad[0]]}"
                )
            return weights
        levels = entries.values.astype(np.int32)
        if entries.primes is not None:
            levels *= prime_table()[entries.primes].astype(np.int32)
        return levels.astype(np.float32) * self.scales[first:][entries.rows]

    def encode(self) -> MdCSR:
        """Encodes to a layer with NumPy planes; int8 values and prime indices are kept as they are.

        Raises:
            FormatError: naming tensor, row and rule.
        """
        chunks: list[EncodedRows] = []
        scales = np.zeros(self.shape[0], np.float32) if self.scales is None else self.scales
        for first, last in row_chunks(self.pointers):
            entries = self.entries(first, last)
            planes: tuple[np.ndarray, ...] = tuple(plane for plane in entries if plane is not None)
            if self.scales is None:
                try:
                    planes, scales[first:last] = quantize_entries(
                        entries.rows,
                        entries.columns,
                        self.weights(entries, first),
                        num_rows=last - first,
                        manifold=self.manifold,
                        first_row=first,
                    )
                except EncodingError as error:
                    self.fail(str(error))
            chunks.append(encode_entries(*planes, num_rows=last - first))
        return assemble(
            chunks, scales, shape=self.shape, manifold=self.manifold, row_alignment=1, dtype=self.dtype
        )


def from_layer(layer: MdCSR, where: str) -> V1Matrix:
    """Reads a layer's planes by the rules of version 1's deltas, independently of the encoder."""
    owned = layer.nnz
    primes = layer.prime_indices
    return V1Matrix(
        where=where,
        shape=layer.shape,
        values=np.asarray(layer.values)[:owned],
        columns=np.asarray(layer.delta_indices)[:owned],
        is_delta=True,
        pointers=np.asarray(layer.row_pointers).astype(np.int64),
        scales=np.asarray(layer.scales),
        primes=None if primes is None else np.asarray(primes)[:owned],
        manifold=layer.manifold,
        dtype=layer.dtype,
    )


def _shape(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise FormatError(f"{where}: shape must be two integers; got {describe(value)}")
    if not all(type(n) is int and 0 <= n <= MAX_ENTRIES for n in value):
        raise FormatError(
            f"{where}: shape must be integers below 2**31; got {', '.join(map(describe, value))}"
        )
    return value[0], value[1]


def _one_of(entry: dict[Any, Any], a: str, b: str, where: str) -> str:
    present = [key for key in (a, b) if entry.get(key) is not None]
    if len(present) != 1:
        raise FormatError(
            f"{where}: must have either {a} or {b}; it has {' and '.join(present) or 'neither'}"
        )
    return present[0]


_KINDS: dict[str, Callable[[np.dtype], bool]] = {
    "int8": lambda dtype: dtype == np.int8,
    "uint8": lambda dtype: dtype == np.uint8,
    "integers": lambda dtype: dtype.kind in "iu",
    "int8 or floats": lambda dtype: dtype == np.int8 or dtype.kind == "f",
}


def _array(entry: dict[Any, Any], key: str, kind: str, where: str) -> np.ndarray:
    value = entry.get(key)
    array = value.array if isinstance(value, PickledArray) else None
    if array is None:
        raise FormatError(f"{where}: {key} must be a NumPy array of {kind}; got {describe(value)}")
    if array.ndim != 1 or not _KINDS[kind](array.dtype):
        raise FormatError(f"{where}: {key} must be a vector of {kind}; got {array.dtype} {array.shape}")
    return array


def _pointers(entry: dict[Any, Any], key: str, rows: int, where: str) -> np.ndarray:
    """Reads row pointers first of all planes: they prove that a matrix has the rows that it claims."""
    pointers = _array(entry, key, "integers", where)
    if pointers.shape[0] != rows + 1:
        raise FormatError(
            f"{where}: there must be one more row pointer than the {rows:,} rows; got {pointers.shape[0]:,}"
        )
    return pointers.astype(np.int64)


def _scales(value: Any, rows: int, where: str) -> np.ndarray:
    array = value.array if isinstance(value, PickledArray) else None
    if type(value) in (int, float):
        array = np.asarray(value, np.float64)
    if array is None or array.dtype.kind not in "fiu" or array.shape not in ((), (1,), (rows,)):
        got = describe(value) if array is None else f"{array.dtype} {array.shape}"
        raise FormatError(
            f"{where}: scales must be one number, or one for each of the {rows:,} rows; got {got}"
        )
    with np.errstate(over="ignore"):
        return np.array(np.broadcast_to(array, rows), np.float32)
