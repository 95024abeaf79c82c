"""Writing version 2 files: planned first, then streamed plane by plane, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from upg_jax._errors import FormatError
from upg_jax._mdcsr import MdCSR
from upg_jax._values import value_bytes
from upg_jax.io._atomic import replacing
from upg_jax.io._header import DTYPES, MAX_HEADER_BYTES, METADATA_KEY, check_text
from upg_jax.io._layout import Item, Placed, data_alignment, describe, place, stored_bytes
from upg_jax.io._metadata import FORMAT, RESERVED, to_strings

INDEX_SUFFIX = ".safetensors.index.json"
_CHUNK_BYTES = 1 << 24


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, MdCSR | jax.Array | np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    model: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes compressed and dense tensors to a version 2 UPG file, atomically.

    The bytes are on disk before the file takes its name; a failure leaves whatever `path` was before.
    Replacing a file that is memory-mapped keeps the old map valid. `docs/format.md` describes the layout; any
    safetensors reader can read it.

    `tensors` is asked for each value more than once, and no value is kept between two questions: a mapping
    that reads its values when asked saves a model of any size in the memory of one tensor.

    Args:
        path: the file to write, by custom `model.safetensors`.
        tensors: name -> `MdCSR` or array (NumPy, memory-mapped or not, or JAX) of any dtype safetensors
            knows. Names are those of the original checkpoint. A stacked `MdCSR` needs one `{}` in its name,
            which becomes each layer's number: files hold single layers, and lay consecutive ones out as a
            stack.
        metadata: further strings for the file's metadata.
        model: the architecture's config, stored as JSON.
        provenance: what made the model, from what, with which settings, stored as JSON.
        max_shard_bytes: if the tensors are larger than this, write `STEM-00001-of-0000N.safetensors` and
            `STEM.safetensors.index.json` beside `path` instead; a single larger tensor gets a shard of its
            own.

    Raises:
        FormatError: for a layer that breaks the format, an array of another dtype, names that collide,
            metadata that is not text, or a destination that already holds a sharded model.
        OSError: for what the disk reports.
    """
    path = Path(path)
    strings = _check_metadata(metadata)
    items = describe(tensors)
    shards = _split(items, max_shard_bytes)
    check_destination(path, sharded=len(shards) > 1)
    headers = [
        to_strings(
            {item.name: item.facts for item in shard if item.facts is not None}, strings, model, provenance
        )
        for shard in shards
    ]
    if len(shards) == 1:
        with replacing(path) as temporary:
            write_file(temporary, place(items), headers[0], tensors)
        return
    _write_shards(path, shards, headers, tensors)


def _check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    strings = dict(metadata or {})
    for key, value in strings.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"save: metadata must map strings to strings; got {key!r}: {value!r}")
        if key in RESERVED:
            raise FormatError(f"save: metadata key {key!r} is written by `save` itself; rename it")
        for text in (key, value):
            check_text(text, "save: metadata")
    return strings


def check_destination(path: Path, *, sharded: bool) -> None:
    """Refuses a directory, and two models side by side of which a reader would have to guess one."""
    if path.is_dir():
        raise IsADirectoryError(f"save: {path} is a directory, not a regular file; name a file in it")
    index = path.with_name(path.stem + INDEX_SUFFIX)
    in_the_way = [index, path] if sharded else [index]
    for existing in in_the_way:
        if existing.exists():
            raise FormatError(
                f"save: {path} and a sharded model cannot stand side by side, and sharded models are not "
                f"replaced in place; {existing} exists; remove the old model or choose another name"
            )


def _split(items: list[Item], max_shard_bytes: int | None) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        nbytes = stored_bytes(item)
        if shards[-1] and max_shard_bytes is not None and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards


def _write_shards(
    path: Path, shards: list[list[Item]], headers: list[dict[str, str]], tensors: Mapping[str, Any]
) -> None:
    """Writes every shard under a temporary name, renames them all, and the index last: it makes the model."""
    layouts: list[list[Placed]] = []
    paddings = 0
    for shard in shards:
        layouts.append(place(shard, paddings))
        paddings += sum(tensor.item is None for tensor in layouts[-1])
    files = [
        path.with_name(f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors")
        for i in range(1, len(shards) + 1)
    ]
    for file in files:
        if file.exists():
            raise FormatError(
                f"save: {file} exists and belongs to no index; remove it or choose another name"
            )
    index = {
        "metadata": {
            "format": FORMAT,
            "total_size": sum(tensor.nbytes for layout in layouts for tensor in layout),
        },
        "weight_map": {
            tensor.name: file.name for file, layout in zip(files, layouts, strict=True) for tensor in layout
        },
    }
    with contextlib.ExitStack() as undo:
        with contextlib.ExitStack() as shard_files:
            for file, layout, strings in zip(files, layouts, headers, strict=True):
                undo.callback(file.unlink, missing_ok=True)
                write_file(shard_files.enter_context(replacing(file)), layout, strings, tensors)
        with replacing(path.with_name(path.stem + INDEX_SUFFIX)) as temporary:
            temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        undo.pop_all()


def write_file(
    path: Path, placed: Sequence[Placed], strings: dict[str, str], tensors: Mapping[str, Any]
) -> None:
    """Writes one file at its final layout; not atomic by itself.

    Args:
        path: the file to fill.
        placed: from `place`.
        strings: its `__metadata__`.
        tensors: the mapping that was described.
    """
    with open(path, "wb") as file:
        file.write(_header(placed, strings))
        for tensor in placed:
            _write_tensor(file, tensor, tensors)


def file_bytes(placed: Sequence[Placed], strings: dict[str, str]) -> int:
    """The size of the file that `write_file` writes."""
    return len(_header(placed, strings)) + max(
        (tensor.offset + tensor.nbytes for tensor in placed), default=0
    )


def _header(placed: Iterable[Placed], strings: dict[str, str]) -> bytes:
    placed = list(placed)
    fields: dict[str, Any] = {METADATA_KEY: strings}
    for tensor in placed:
        offsets = [tensor.offset, tensor.offset + tensor.nbytes]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % data_alignment(placed)
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"save: the header must be at most {MAX_HEADER_BYTES:,} bytes; it needs {length:,}; set "
            "max_shard_bytes"
        )
    return length.to_bytes(8, "little") + text.ljust(length)


def _write_tensor(file: BinaryIO, tensor: Placed, tensors: Mapping[str, Any]) -> None:
    written = 0
    if tensor.item is not None:
        array = _fetch(tensor, tensors[tensor.item.key])
        for chunk in _chunks(array):
            file.write(chunk)
        written = array.nbytes
    # Padding tensors, and the tails of planes, are zeros.
    for start in range(written, tensor.nbytes, _CHUNK_BYTES):
        file.write(bytes(min(_CHUNK_BYTES, tensor.nbytes - start)))


def _fetch(tensor: Placed, leaf: Any) -> np.ndarray:
    """Takes one tensor out of its leaf, without the tail of zeros that the leaf may have."""
    item = tensor.item
    assert item is not None
    shape = tensor.shape
    if item.facts is not None:
        leaf = getattr(leaf, str(tensor.plane))
        if item.index is not None:
            leaf = leaf[item.index]
        if tensor.plane in item.facts.padded_planes:
            bits = item.facts.value_bits if tensor.plane == "values" else 8
            shape = (value_bytes(item.owned, bits),)
            leaf = leaf[: shape[0]]
    array = np.asarray(leaf)
    if array.shape != shape or array.dtype != DTYPES[tensor.dtype][1]:
        raise FormatError(
            f"save: tensor {item.name!r}: must not change while it is saved; it was {tensor.dtype} {shape} "
            f"and is {array.dtype} {array.shape}"
        )
    return array


def _chunks(array: np.ndarray) -> Iterator[memoryview]:
    """Yields the array's bytes in C order; a contiguous array is never copied."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].data
