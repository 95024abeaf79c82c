"""The two kinds of version 1 files as lists of tensors to convert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from upg_jax._encode import encode_dense
from upg_jax._errors import EncodingError, FormatError
from upg_jax._mdcsr import Manifold, MdCSR
from upg_jax.io._header import CODE_OF
from upg_jax.io._pickle_values import PickledArray, PickledCSR, describe
from upg_jax.io._reader import UPGDecompressor
from upg_jax.io._v1_matrix import V1Matrix
from upg_jax.io._v1_verify import check_array, check_matrix, check_pruned

Kind = Literal["weights", "catalogue"]


class Source(Protocol):
    """What a catalogue is filled from; `upg_jax.io.open_checkpoint` makes one."""

    def names(self) -> list[str]:
        """Returns the tensors' names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        ...


class Job(Protocol):
    """One kind of version 1 file."""

    kind: Kind

    def names(self) -> list[str]:
        """Returns all tensors to convert."""
        ...

    def model(self) -> dict[str, Any] | None:
        """Returns the architecture's config, where there is one."""
        ...

    def source_files(self) -> list[Path]:
        """Returns the files that weights come from, other than the version 1 file."""
        ...

    def convert(self, name: str) -> MdCSR | np.ndarray:
        """Reads a tensor and compresses it, if it is to be."""
        ...

    def verify(self, name: str, written: UPGDecompressor) -> None:
        """Checks what was written of a tensor against what it was made from."""
        ...


class Weights:
    """A file with weights."""

    kind: Kind = "weights"

    def __init__(self, path: Path, tensors: Any, manifold: Manifold) -> None:
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise FormatError(
                f"{path}: 'tensors' must be a dict of names to tensors; got {describe(tensors)}"
            )
        self._path = path
        self._tensors: dict[str, Any] = tensors
        self._manifold = manifold

    def names(self) -> list[str]:
        """See `Job`."""
        return list(self._tensors)

    def model(self) -> dict[str, Any] | None:
        """See `Job`."""
        return None

    def source_files(self) -> list[Path]:
        """See `Job`."""
        return []

    def _tensor(self, name: str) -> V1Matrix | np.ndarray:
        value, where = self._tensors[name], f"{self._path}: tensor {name!r}"
        if isinstance(value, dict):
            return V1Matrix.from_dict(value, where)
        if isinstance(value, PickledCSR):
            return V1Matrix.from_scipy(value, self._manifold, where)
        array = value.array if isinstance(value, PickledArray) else None
        if array is None or array.dtype not in CODE_OF:
            raise FormatError(
                f"{where}: must be a dict, a scipy CSR matrix or a NumPy array; got {describe(value)}"
            )
        return array

    def convert(self, name: str) -> MdCSR | np.ndarray:
        """See `Job`."""
        tensor = self._tensor(name)
        return tensor if isinstance(tensor, np.ndarray) else tensor.encode()

    def verify(self, name: str, written: UPGDecompressor) -> None:
        """See `Job`."""
        tensor = self._tensor(name)
        if isinstance(tensor, np.ndarray):
            check_array(
                np.asarray(written.get_array(name, device=False)), tensor, f"{self._path}: tensor {name!r}"
            )
        else:
            check_matrix(written.get_layer(name, device=False), tensor)


class Catalogue:
    """A file that only lists tensors."""

    kind: Kind = "catalogue"

    def __init__(self, path: Path, files: Any, source: Source | None) -> None:
        self._path = path
        listed = dict(_listed(path, files))
        if source is None:
            raise FormatError(
                f"{path}: the file holds only a catalogue of {len(listed)} tensors, no weights; give the "
                "original checkpoint to compress them from: `upg-jax convert FILE OUT --source DIR`, or "
                "convert_v1(..., source=upg_jax.io.open_checkpoint(DIR))"
            )
        self._source = source
        self._names = source.names()
        self._wanted: dict[str, tuple[float, Manifold]] = {}
        for name, entry in listed.items():
            self._add(name, entry)

    def _add(self, name: str, entry: dict[Any, Any]) -> None:
        where = f"{self._path}: tensor {name!r}"
        if name not in self._names:
            raise FormatError(f"{where}: is listed, but the source checkpoint does not have it")
        shape, has = entry.get("shape"), self._source.shape(name)
        if not isinstance(shape, (list, tuple)) or tuple(shape) != tuple(has):
            got = ", ".join(map(describe, shape[:8])) if isinstance(shape, (list, tuple)) else describe(shape)
            raise FormatError(
                f"{where}: shape must be that of the source checkpoint, {tuple(has)}; got ({got})"
            )
        sparsity = entry.get("sparsity_level")
        if sparsity is None or len(has) != 2:
            return
        if type(sparsity) not in (int, float) or not 0.0 <= sparsity <= 1.0:
            raise FormatError(
                f"{where}: sparsity_level must be a fraction in [0, 1]; got {describe(sparsity)}"
            )
        self._wanted[name] = 1.0 - sparsity, "prime" if entry.get("manifold_encoded") is True else "unit"

    def names(self) -> list[str]:
        """See `Job`."""
        return self._names

    def model(self) -> dict[str, Any] | None:
        """See `Job`."""
        return getattr(self._source, "config", None)

    def source_files(self) -> list[Path]:
        """See `Job`."""
        return list(self._source.source_files()) if hasattr(self._source, "source_files") else []

    def convert(self, name: str) -> MdCSR | np.ndarray:
        """See `Job`."""
        w = self._source.read(name)
        if name not in self._wanted:
            return w
        density, manifold = self._wanted[name]
        try:
            return encode_dense(w, density=density, manifold=manifold)
        except EncodingError as error:
            raise FormatError(f"{self._path}: tensor {name!r}: {error}") from None

    def verify(self, name: str, written: UPGDecompressor) -> None:
        """See `Job`."""
        w, where = self._source.read(name), f"{self._path}: tensor {name!r}"
        if name in self._wanted:
            check_pruned(written.get_layer(name, device=False), w, self._wanted[name][0], where)
        else:
            check_array(np.asarray(written.get_array(name, device=False)), w, where)


def _listed(path: Path, files: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields the entries of a catalogue."""
    seen: set[str] = set()
    if not isinstance(files, (list, tuple)) or not all(isinstance(file, dict) for file in files):
        raise FormatError(f"{path}: 'files' must be a list of dicts; got {describe(files)}")
    for file in files:
        tensors = file.get("tensors")
        if not isinstance(tensors, (list, tuple)):
            raise FormatError(f"{path}: each of 'files' must list its tensors; got {describe(tensors)}")
        for entry in tensors:
            name = entry.get("name") if isinstance(entry, dict) else entry
            if not isinstance(entry, dict) or not isinstance(name, str):
                raise FormatError(f"{path}: a listed tensor must be a dict with a name; got {describe(name)}")
            if name in seen:
                raise FormatError(f"{path}: tensor {name!r}: is listed more than once")
            seen.add(name)
            yield name, entry
