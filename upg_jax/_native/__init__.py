"""The compiled CPU kernels: finding, checking and loading the library, and calling what is no XLA operation.

The library has a plain C interface and knows nothing of Python. `load` registers its XLA handlers once; where that
cannot be, `unavailable_reason` says why and everything falls back to pure JAX or NumPy. docs/native.md describes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._native._conversion import INDEX_NUMBERS, SIGNATURES, Conversions

SPARSE_DENSE = "upg_jax.sparse_dense.v2"
DENSE_SPARSE = "upg_jax.dense_sparse.v2"
DECODE = "upg_jax.decode.v3"
ATTEND = "upg_jax.attend.v1"
SPARSE_DENSE_NARROW = "upg_jax.sparse_dense_narrow.v1"
DECODE_NARROW = "upg_jax.decode_narrow.v1"
_HANDLERS = {SPARSE_DENSE, DENSE_SPARSE, DECODE, ATTEND, SPARSE_DENSE_NARROW, DECODE_NARROW}

KERNELS_VARIABLE = "UPG_JAX_NATIVE_KERNELS"
# Of `src/c_api.h`.
_INTERFACE = 2
# Older ones register handlers that were built for newer ones without a word; the first use of JAX then fails.
_OLDEST_JAXLIB = (0, 10)


class Library:
    """The loaded library; methods mirror `src/c_api.h`."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        size, text, pointer = ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "upg_interface": (ctypes.c_int, []),
            "upg_ffi_api_major": (ctypes.c_int, []),
            "upg_ffi_api_minor": (ctypes.c_int, []),
            "upg_handler_name": (text, [size]),
            "upg_handler": (pointer, [size]),
            "upg_usable_kernels": (text, [size]),
            "upg_kernels": (text, []),
            "upg_choose_kernels": (ctypes.c_int, [text]),
            "upg_scratch_floats": (size, [ctypes.c_int, size, size, size, size, size, ctypes.c_int]),
            "upg_first_row_outside": (size, [pointer, pointer, size, size, size]),
        }
        for name, (result, arguments) in (signatures | SIGNATURES).items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments

    def conversions(
        self, index: str, shape: tuple[int, int], row_pointers: np.ndarray, **planes: np.ndarray | None
    ) -> Conversions:
        """Conversions of the planes of one layer to another index."""
        return Conversions(self._c, index, shape, row_pointers, **planes)

    @property
    def interface(self) -> int:
        """The version of `src/c_api.h`."""
        return self._c.upg_interface()

    @property
    def ffi_api(self) -> tuple[int, int]:
        """The version of XLA's FFI that the handlers were built for."""
        return self._c.upg_ffi_api_major(), self._c.upg_ffi_api_minor()

    @property
    def handlers(self) -> dict[str, int]:
        """Addresses of the XLA handlers by target name."""
        found: dict[str, int] = {}
        while name := self._c.upg_handler_name(len(found)):
            found[name.decode()] = self._c.upg_handler(len(found))
        return found

    @property
    def usable_kernels(self) -> list[str]:
        """Names of the instruction sets that this build has kernels for and this processor runs, best first."""
        found: list[str] = []
        while name := self._c.upg_usable_kernels(len(found)):
            found.append(name.decode())
        return found

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        return self._c.upg_kernels().decode()

    @contextlib.contextmanager
    def use_kernels(self, name: str) -> Iterator[None]:
        """Runs with another instruction set's kernels; takes effect at once, for the whole process."""
        before = self.kernels
        if not self._c.upg_choose_kernels(name.encode()):
            raise ValueError(f"use_kernels: must be one of {self.usable_kernels}; got {name!r}")
        try:
            yield
        finally:
            self._c.upg_choose_kernels(before.encode())

    def choose_kernels(self, name: str) -> bool:
        """Sets the instruction set for the rest of the process; False where it is not usable."""
        return bool(self._c.upg_choose_kernels(name.encode()))

    def scratch_floats(
        self,
        *,
        transposed: bool,
        groups: int,
        vectors: int,
        rows: int,
        columns: int,
        capacity: int,
        index: str,
    ) -> int:
        """Floats of scratch memory that a product needs; the same on every machine."""
        encoding = INDEX_NUMBERS[index]
        return self._c.upg_scratch_floats(transposed, groups, vectors, rows, columns, capacity, encoding)

    def first_row_outside(self, deltas: np.ndarray, row_pointers: np.ndarray, in_features: int) -> int | None:
        """Finds the first row of one layer whose deltas add up to `in_features` or more.

        Args:
            deltas: uint8 `(capacity,)`; may be memory-mapped.
            row_pointers: uint32 `(rows + 1,)`.
            in_features: columns of the matrix.
        """
        # A file may put a plane at any byte.
        deltas, row_pointers = (np.require(p, requirements=("C", "A")) for p in (deltas, row_pointers))
        if deltas.dtype != np.uint8 or row_pointers.dtype != np.uint32 or row_pointers.size == 0:
            raise TypeError("first_row_outside: needs uint8 deltas and at least one uint32 row pointer")
        rows = row_pointers.size - 1
        row = self._c.upg_first_row_outside(
            deltas.ctypes.data, row_pointers.ctypes.data, rows, in_features, deltas.size
        )
        return None if row == rows else row


def load() -> Library | None:
    """The library with its handlers registered, or None; `unavailable_reason` then says why."""
    found = _load()
    return found if isinstance(found, Library) else None


def unavailable_reason() -> str | None:
    """Says why the library cannot be used in this process; None where it can."""
    found = _load()
    return found if isinstance(found, str) else None


def too_old_reason() -> str | None:
    """Says why handlers built for XLA cannot run on this jaxlib whatever they were built for; None where they can."""
    jaxlib = importlib.metadata.version("jaxlib")
    if tuple(int(n) for n in re.findall(r"\d+", jaxlib)[:2]) < _OLDEST_JAXLIB:
        return f"the compiled kernels need jaxlib {'.'.join(map(str, _OLDEST_JAXLIB))} or newer; this is {jaxlib}"
    return None


def library_path() -> Path | None:
    """Where the library lies; None for an install without it."""
    # An editable install has the sources in one folder of the package's path and what it built in another.
    return next((p for folder in __path__ if (p := Path(folder) / "libupg_native.so").exists()), None)


@functools.cache
def _load() -> Library | str:
    path = library_path()
    if path is None:
        return "it was installed without the compiled kernels (no C++17 compiler when it was installed?)"
    if reason := too_old_reason():
        return reason
    try:
        library = Library(path)
    except OSError as error:
        return f"the compiled kernels do not load: {error}"
    except AttributeError as error:  # a function that they lack
        return f"the compiled kernels are not of this version; reinstall upg_jax: {error}"
    if library.interface != _INTERFACE:
        return (
            f"the compiled kernels are not of this version; reinstall upg_jax: interface {library.interface}"
        )
    missing = _HANDLERS - library.handlers.keys()
    if missing:
        return f"the compiled kernels are not of this version; reinstall upg_jax: they lack {min(missing)}"
    built, running = library.ffi_api, running_ffi_api()
    if running is None or built[0] != running[0] or built[1] > running[1]:
        jaxlib = importlib.metadata.version("jaxlib")
        reason = (
            f"the compiled kernels were built for XLA FFI {built[0]}.{built[1]}, and jaxlib {jaxlib} has "
            f"{'an unknown version' if running is None else '.'.join(map(str, running))}; reinstall upg_jax"
        )
        warnings.warn(f"upg_jax: {reason}; sparse_dense falls back to pure JAX", stacklevel=2)
        return reason
    wanted = os.environ.get(KERNELS_VARIABLE)
    if wanted and not library.choose_kernels(wanted):
        reason = f"{KERNELS_VARIABLE} is {wanted!r}; this processor runs {', '.join(library.usable_kernels)}"
        warnings.warn(f"upg_jax: {reason}; sparse_dense falls back to pure JAX", stacklevel=2)
        return reason
    _register(library)
    return library


def running_ffi_api() -> tuple[int, int] | None:
    """The FFI version of the running jaxlib, from the header it ships: it does not say so anywhere else."""
    import jax

    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return None
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.M) for part in ("MAJOR", "MINOR")]
    major, minor = found
    return (int(major[1]), int(minor[1])) if major and minor else None


def _register(library: Library) -> None:
    import jax

    for name, address in library.handlers.items():
        capsule = jax.ffi.pycapsule(ctypes.c_void_p(address))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
