"""What a pickle may be made of besides plain values: NumPy arrays and scipy CSR matrices, rebuilt by hand.

Each function here stands in for the one that a pickle names, checks its arguments and makes inert data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_RANK = 32
ELEMENT_TYPES = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")


class RefusedError(Exception):
    """A rule that the pickle breaks; the machine adds file and offset."""


@dataclasses.dataclass(slots=True)
class Global:
    """A name the pickle refers to, already found to be allowed."""

    name: str


@dataclasses.dataclass(slots=True)
class PickledArray:
    """A NumPy array, or None until the pickle has given its contents."""

    array: np.ndarray | None = None

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes the place of `numpy.ndarray.__setstate__`."""
        if self.array is not None or not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array has a state of unknown form")
        _, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C", budget)


@dataclasses.dataclass(slots=True)
class PickledCSR:
    """A `scipy.sparse` CSR matrix's attributes."""

    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes the place of filling `__dict__`."""
        if not isinstance(state, dict):
            raise RefusedError("a sparse matrix has a state of unknown form")
        self.state = state


@dataclasses.dataclass(slots=True)
class PickledDType:
    """A NumPy dtype of numbers."""

    code: str
    order: str = "<"

    @property
    def numpy(self) -> np.dtype:
        """The dtype itself."""
        return np.dtype(self.order + self.code)

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes the place of `numpy.dtype.__setstate__`, which is given the byte order."""
        if not isinstance(state, tuple) or len(state) < 8 or state[1] not in ("<", ">", "|", "="):
            raise RefusedError("a dtype has a state of unknown form")
        if any(field is not None for field in state[2:5]):
            raise RefusedError("arrays of records are not allowed")
        self.order = ">" if state[1] == ">" else "<"


@dataclasses.dataclass(slots=True)
class Budget:
    """Bytes that text and arrays may still be turned into.

    Twice the file is enough, which holds each array's bytes once, maybe as text. Without a bound, a small
    file could make the same large array a million times.
    """

    left: int

    def take(self, nbytes: int) -> None:
        """Counts bytes about to be made."""
        self.left -= nbytes
        if self.left < 0:
            raise RefusedError("the arrays must not have more bytes than the file")


def describe(value: Any) -> str:
    """Names a value in a message; never its whole contents, which may be endless."""
    if isinstance(value, Global):
        return value.name
    if isinstance(value, (str, bytes)):
        return repr(value[:80])
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    return type(value).__name__


def hashable(value: Any) -> bool:
    """Tells whether a value may be a dict's key; hashing nested tuples can take forever."""
    return isinstance(value, (str, int, float, bytes, type(None)))


def _array(data: Any, dtype: Any, shape: Any, order: Any, budget: Budget) -> np.ndarray:
    if not isinstance(dtype, PickledDType):
        raise RefusedError(f"an array's dtype must be a numpy.dtype; got {describe(dtype)}")
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_RANK
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise RefusedError(
            f"an array's shape must be at most {MAX_RANK} non-negative integers; got {describe(shape)}"
        )
    if isinstance(data, str):  # Python 2's bytes
        data = _latin1(budget, data)
    if not isinstance(data, (bytes, bytearray)):
        raise RefusedError(f"an array's data must be bytes; got {describe(data)}")
    itemsize = dtype.numpy.itemsize
    if math.prod(max(n, 1) for n in shape) >= 2**63 or math.prod(shape) * itemsize != len(data):
        raise RefusedError(f"an array of {dtype.numpy} {shape} cannot have {len(data):,} bytes")
    if order not in ("C", "F"):
        raise RefusedError(f"an array's order must be 'C' or 'F'; got {describe(order)}")
    budget.take(len(data))
    array = np.frombuffer(data, dtype.numpy).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _new_array(_: Budget, kind: Any, shape: Any, __: Any) -> PickledArray:
    if not isinstance(kind, Global) or kind.name != "numpy.ndarray" or shape != (0,):
        raise RefusedError("an array must be a numpy.ndarray that is filled later")
    return PickledArray()


def _array_from_buffer(budget: Budget, data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    return PickledArray(_array(data, dtype, shape, order, budget))


def _scalar(budget: Budget, dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C", budget).item()


def _new_dtype(_: Budget, code: Any, align: Any = False, copy: Any = False) -> PickledDType:
    if not isinstance(code, str) or code.lstrip("<>=|") not in ELEMENT_TYPES:
        raise RefusedError(
            f"arrays must be of numbers ({', '.join(ELEMENT_TYPES)}); got dtype {describe(code)}"
        )
    return PickledDType(code.lstrip("<>=|"), ">" if code[0] == ">" else "<")


def _latin1(budget: Budget, text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("_codecs.encode is allowed for Latin-1 text only")
    budget.take(len(text))
    return text.encode("latin-1")


def _no_bytes(_: Budget) -> bytes:
    return b""


def _new_dict(_: Budget) -> dict[Any, Any]:
    return {}


def _new_set(_: Budget, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise RefusedError(f"a set must be made from a list; got {describe(values)}")
    return values


def new_csr(kind: Any) -> PickledCSR:
    """Makes an empty sparse matrix, if that is what `kind` names."""
    if not isinstance(kind, Global) or kind.name not in _SCIPY_CSR:
        raise RefusedError(f"the pickle makes an object of {describe(kind)}, which is not allowed")
    return PickledCSR()


def _reconstructor(_: Budget, kind: Any, base: Any, state: Any) -> PickledCSR:
    return new_csr(kind)


_SCIPY_CSR = frozenset(
    f"scipy.sparse.{module}.{name}"
    for module in ("_csr", "csr", "_arrays")
    for name in ("csr_matrix", "csr_array")
)
_NUMPY_CORES = ("numpy.core", "numpy._core")
_BUILTINS = ("builtins", "__builtin__")

# What a pickle may refer to, and what takes its place; None for what is only an argument of others.
ALLOWED: dict[str, Callable[..., Any] | None] = {
    "numpy.ndarray": None,
    "numpy.dtype": _new_dtype,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": _new_dict,
    **{f"{core}.multiarray._reconstruct": _new_array for core in _NUMPY_CORES},
    **{f"{core}.multiarray.scalar": _scalar for core in _NUMPY_CORES},
    **{f"{core}.numeric._frombuffer": _array_from_buffer for core in _NUMPY_CORES},
    **{f"{module}._reconstructor": _reconstructor for module in ("copyreg", "copy_reg")},
    **{f"{module}.{name}": _new_set for module in _BUILTINS for name in ("set", "frozenset")},
    **{f"{module}.bytes": _no_bytes for module in _BUILTINS},
    **{f"{module}.object": None for module in _BUILTINS},
    **dict.fromkeys(_SCIPY_CSR, None),
}


def construct(target: Any, arguments: Any, budget: Budget) -> Any:
    """Does what a pickle's call stands for.

    Raises:
        RefusedError: if it is not one of the reconstructions, or has arguments they never have.
    """
    constructor = ALLOWED[target.name] if isinstance(target, Global) else None
    if constructor is None or not isinstance(arguments, tuple):
        raise RefusedError(f"the pickle calls {describe(target)}, which is not allowed")
    try:
        return constructor(budget, *arguments)
    except TypeError:
        raise RefusedError(f"the pickle calls {target.name} with {len(arguments)} arguments") from None
