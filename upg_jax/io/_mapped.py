"""Memory-mapped safetensors files, and finding the files of a model."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax import _mapped_memory
from upg_jax._errors import FormatError
from upg_jax.io._header import DTYPES, MAX_HEADER_BYTES, Header, read_header, show, strict_json
from upg_jax.io._open import looks_like, open_regular
from upg_jax.io._writer import INDEX_SUFFIX


class MappedFile:
    """A checked header and a read-only map of one safetensors file.

    Views keep the map alive by themselves, even when the file's name is given to another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self.header: Header = read_header(file, path)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(pages, np.uint8)
        _mapped_memory.register(pages, self._bytes.ctypes.data, self._bytes.nbytes)

    def view(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor; nothing is read."""
        tensor = self.header.tensors[name]
        return self._view(name, tensor.stop, tensor.shape)

    def stack_view(self, names: list[str]) -> np.ndarray | None:
        """Returns tensors that lie side by side as one read-only array, or None where they do not."""
        tensors = [self.header.tensors[name] for name in names]
        first = tensors[0]
        for i, tensor in enumerate(tensors):
            same = tensor.dtype == first.dtype and tensor.shape == first.shape
            if not same or tensor.start != first.start + i * first.nbytes:
                return None
        return self._view(names[0], tensors[-1].stop, (len(names), *first.shape))

    def _view(self, first: str, stop: int, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self.header.tensors[first]
        dtype = DTYPES[tensor.dtype][1]
        if dtype is None:
            raise FormatError(f"{self.path}: tensor {show(first)}: NumPy has no dtype like {tensor.dtype}")
        return self._bytes[tensor.start : stop].view(dtype).reshape(shape)


def total_memory() -> int:
    """Bytes of memory that this machine has; where that is unknown, what a 64-bit process can address."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**47


def open_files(path: str | os.PathLike[str]) -> list[MappedFile]:
    """Opens a safetensors file, the shards that an index lists, or the one model in a directory.

    Raises:
        FileNotFoundError: if `path` does not exist.
        FormatError: naming the file and the rule that is broken.
    """
    path = Path(path)
    if path.is_dir():
        path = _model_in(path)
    if path.suffix != ".json":
        return [MappedFile(path)]
    weight_map = _read_index(path)
    names_in: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        names_in.setdefault(file_name, set()).add(name)
    files = []
    for file_name, names in names_in.items():
        shard = path.with_name(file_name)
        if not shard.exists():
            raise FormatError(f"{path}: weight_map lists {show(file_name)}, which is missing; copy it there")
        files.append(MappedFile(shard))
        differ = sorted(names.symmetric_difference(files[-1].header.tensors))
        if differ:
            holder = "the index" if differ[0] in names else "the shard"
            raise FormatError(
                f"{shard}: index and shard must hold the same tensors; {show(differ[0])} is only in {holder}"
            )
    return files


def _model_in(directory: Path) -> Path:
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
        found = sorted(file for file in directory.glob(pattern) if not file.name.startswith("."))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise FormatError(f"{directory}: must hold one model; got {names}; name the one to open")
    raise FormatError(f"{directory}: the directory holds no *.safetensors file and no *{INDEX_SUFFIX}")


def _read_index(path: Path) -> dict[str, str]:
    with open_regular(path) as file:
        text = file.read(MAX_HEADER_BYTES + 1)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: an index must be at most {MAX_HEADER_BYTES:,} bytes")
    known = looks_like(text[:64])
    if known is not None:
        raise FormatError(f"{path}: must be a JSON index; it is {known}")
    index: Any = strict_json(text, f"{path}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path}: an index must have a weight_map of tensors to files; got {show(weight_map)}"
        )
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise FormatError(
                f"{path}: weight_map must name files beside the index; {show(name)} is in {show(file_name)}"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name.isprintable() and name not in ("", ".", "..") and not any(c in name for c in "/\\:")
