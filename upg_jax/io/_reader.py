"""Reading version 2 files without copying them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import FormatError
from upg_jax._mdcsr import PLANES, MdCSR, stack
from upg_jax._validate import check_scales, validate
from upg_jax.io._header import DTYPES, show
from upg_jax.io._info import TensorInfo
from upg_jax.io._mapped import MappedFile, open_files, total_memory
from upg_jax.io._metadata import PADDING_PREFIX, FileFacts, MatrixFacts, check_planes, from_strings


class UPGDecompressor:
    """An open version 2 UPG model: names and sizes at once, layers on demand, planes never copied on CPU.

    Opening reads headers only. A layer's planes are views of the memory map (`jax.device_put` shares aligned
    host memory on CPU; on other devices it copies), and a layer's row pointers, columns and scales are
    checked once, before it is handed out first.

    Every array keeps the map it lies in alive, so `close`, which is also what leaving a `with` block does,
    only ends reading: layers stay valid, and the map goes when the last of them does. Replacing the file (as
    `save` does) leaves open maps on the old content. Changing it in place while it is open, as no careful
    writer does, goes unnoticed, and truncating it may end the process.
    """

    def __init__(self, files: Sequence[MappedFile]) -> None:
        self._files = list(files)
        facts = [from_strings(file.header.metadata, file.path) for file in self._files]
        first = facts[0]
        self._matrices: dict[str, tuple[MappedFile, MatrixFacts]] = {}
        self._dense: dict[str, MappedFile] = {}
        for file, of_file in zip(self._files, facts, strict=True):
            for key in ("model", "provenance", "other"):
                if getattr(of_file, key) != getattr(first, key):
                    raise FormatError(
                        f"{file.path}: all shards of a model must carry the same metadata; its {key} "
                        f"differs from that of {self._files[0].path.name}"
                    )
            self._add(file, of_file)
        self.metadata: dict[str, str] = first.other
        self.model: dict[str, Any] | None = first.model
        self.provenance: dict[str, Any] | None = first.provenance
        self._checked: set[str] = set()
        self._closed = False

    @classmethod
    def from_safetensors(cls, path: str | os.PathLike[str]) -> UPGDecompressor:
        """Opens a file, a `*.safetensors.index.json`, or a directory that holds one model.

        Raises:
            FileNotFoundError: if `path` does not exist.
            FormatError: if a header breaks a rule of the format; the message names file, tensor and rule.
        """
        return cls(open_files(path))

    def _add(self, file: MappedFile, facts: FileFacts) -> None:
        stored = dict(file.header.tensors)
        for name, tensor in file.header.tensors.items():
            if name.startswith(PADDING_PREFIX):
                if tensor.dtype != "U8":
                    raise FormatError(
                        f"{file.path}: tensor {show(name)}: padding must be U8; got {tensor.dtype}"
                    )
                del stored[name]
        for name, matrix in facts.matrices.items():
            check_planes(file.header.tensors, name, matrix, file.path)
            for plane in PLANES:
                stored.pop(f"{name}.{plane}", None)
            self._check_new(file, name)
            self._matrices[name] = file, matrix
        for name in stored:
            self._check_new(file, name)
            self._dense[name] = file

    def _check_new(self, file: MappedFile, name: str) -> None:
        if name in self._matrices or name in self._dense:
            raise FormatError(f"{file.path}: tensor {show(name)}: names must be unique; it is there twice")

    def names(self) -> list[str]:
        """Returns all tensors' names as in the original checkpoint, the compressed matrices first."""
        self._check_open()
        return [*self._matrices, *self._dense]

    def info(self, name: str) -> TensorInfo:
        """Describes a tensor from the header alone."""
        if name in self._matrices:
            file, facts = self._matrices[name]
            planes = [file.header.tensors[f"{name}.{plane}"] for plane in facts.plane_shapes(0)]
            values = planes[0].shape[0]
            return TensorInfo(
                name=name,
                kind="mdcsr",
                shape=facts.shape,
                dtype=facts.dtype,
                stored_bytes=sum(plane.nbytes for plane in planes),
                manifold=facts.manifold,
                capacity=values * 8 // facts.value_bits,
                true_nnz=facts.true_nnz,
                row_alignment=facts.row_alignment,
                index=facts.index,
                value_bits=facts.value_bits,
                group_size=facts.group_size,
            )
        tensor = self._find(self._dense, name).header.tensors[name]
        dtype = DTYPES[tensor.dtype][1]
        return TensorInfo(
            name=name,
            kind="dense",
            shape=tensor.shape,
            dtype=tensor.dtype if dtype is None else dtype.name,
            stored_bytes=tensor.nbytes,
        )

    def get_layer(self, name: str, *, device: bool = True) -> MdCSR:
        """Returns a compressed matrix whose planes are views of the file.

        Args:
            name: name of a compressed matrix.
            device: False leaves the planes as read-only NumPy views of the map.

        Raises:
            FormatError: if there is no such matrix, or a row could take a kernel out of bounds or has a bad
                scale.
        """
        layer = self._host_layer(name)
        return jax.tree.map(jax.device_put, layer) if device else layer

    def get_stack(self, names: Sequence[str], *, device: bool = True) -> MdCSR:
        """Returns matrices of equal metadata as one stacked `MdCSR`, in the order of `names`.

        Matrices that the writer laid side by side, as it does for consecutive layers, become one contiguous
        view of the file; others are copied by `upg_jax.stack`.

        Raises:
            FormatError: as `get_layer`.
            ValueError: if there is no name, or metadata differ.
        """
        layers = [self._host_layer(name) for name in names]
        stacked = self._stack_view(list(names)) or stack(layers)
        return jax.tree.map(jax.device_put, stacked) if device else stacked

    def get_array(self, name: str, *, device: bool = True) -> jax.Array | np.ndarray:
        """Returns a tensor that was left dense, as a view of the file.

        Args:
            name: name of a dense tensor.
            device: False leaves it a read-only NumPy view of the map.

        Raises:
            FormatError: if there is no such tensor, or NumPy or JAX has no dtype like its own.
        """
        file = self._find(self._dense, name)
        array = file.view(name)
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            raise FormatError(f"{file.path}: tensor {show(name)}: BOOL must hold only bytes 0 and 1")
        if not device:
            return array
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise FormatError(
                f"{file.path}: tensor {show(name)}: JAX would narrow {array.dtype}; set jax_enable_x64, or "
                "take the NumPy view with device=False"
            )
        return jax.device_put(array)

    def decompress_layer(self, name: str, dtype: Any | None = None) -> jax.Array:
        """Returns any tensor as a dense array, decoding it where it is compressed.

        Args:
            name: name of a compressed or dense tensor.
            dtype: of the result; by default the original's.

        Raises:
            FormatError: as `get_layer` and `get_array`, and if the dense matrix could not fit the memory: a small
                file may claim a matrix of any size.
        """
        if name in self._matrices:
            self._check_dense_size(name)
            return self.get_layer(name).to_dense(dtype)
        return jnp.asarray(self.get_array(name), dtype)

    def _check_dense_size(self, name: str) -> None:
        file, facts = self._matrices[name]
        nbytes = 4 * math.prod(facts.shape)
        if nbytes > total_memory():
            raise FormatError(
                f"{file.path}: tensor {show(name)}: its shape {facts.shape} must fit the memory when it is decoded; "
                f"that takes {nbytes:,} bytes; use the layer as it is, with sparse_dense"
            )

    def verify(self, progress: Callable[[str], None] | None = None) -> None:
        """Checks every rule of the format on every tensor; reads the whole model once.

        Args:
            progress: called with each tensor's name before it is checked.

        Raises:
            FormatError: naming file, tensor, row and rule of the first thing that is wrong.
        """
        self._check_open()
        for name, (file, facts) in self._matrices.items():
            if progress is not None:
                progress(name)
            layer = self._host_layer(name)
            where = f"{file.path}: tensor {show(name)}"
            validate(layer, "full", where=where)
            if layer.true_nnz != facts.true_nnz:
                raise FormatError(
                    f"{where}: true_nnz must be {layer.true_nnz:,}; the metadata says {facts.true_nnz:,}"
                )
        for name in self._dense:
            if progress is not None:
                progress(name)
            if self.info(name).dtype == "bool":
                self.get_array(name, device=False)
        for file in self._files:
            for name in file.header.tensors:
                if name.startswith(PADDING_PREFIX) and file.view(name).any():
                    raise FormatError(f"{file.path}: tensor {show(name)}: padding must be zeros")

    def close(self) -> None:
        """Ends reading; arrays that were handed out stay valid. Closing twice is fine."""
        self._closed = True
        self._files, self._matrices, self._dense = [], {}, {}

    def __enter__(self) -> UPGDecompressor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._matrices or name in self._dense

    def __repr__(self) -> str:
        if self._closed:
            return "UPGDecompressor(closed)"
        files = ", ".join(str(file.path) for file in self._files)
        return f"UPGDecompressor({files}: {len(self._matrices)} compressed, {len(self._dense)} dense)"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("UPGDecompressor: reading needs an open file; this one was closed")

    def _find(self, among: dict[str, Any], name: str) -> Any:
        self._check_open()
        if name in among:
            return among[name]
        where = self._files[0].path
        if name in self._matrices:
            raise FormatError(
                f"{where}: tensor {show(name)}: is compressed; use get_layer or decompress_layer"
            )
        if name in self._dense:
            raise FormatError(f"{where}: tensor {show(name)}: is dense; use get_array or decompress_layer")
        close = difflib.get_close_matches(str(name), self.names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise FormatError(f"{where}: there is no tensor {show(name)}{hint}")

    def _host_layer(self, name: str) -> MdCSR:
        file, facts = self._find(self._matrices, name)
        planes = {plane: file.view(f"{name}.{plane}") for plane in facts.plane_shapes(0)}
        layer = _layer(planes, facts)
        if name not in self._checked:
            where = f"{file.path}: tensor {show(name)}"
            validate(layer, where=where)
            check_scales(planes["scales"], where)
            self._checked.add(name)
        return layer

    def _stack_view(self, names: list[str]) -> MdCSR | None:
        """The stack as one view where the file is laid out so; planes without a tail may be copied."""
        found = [self._matrices[name] for name in names]
        if not found or len({id(file) for file, _ in found}) > 1:
            return None
        if len({dataclasses.replace(facts, true_nnz=0) for _, facts in found}) > 1:
            return None
        file, facts = found[0]
        planes = {}
        for plane in facts.plane_shapes(0):
            stored = [f"{name}.{plane}" for name in names]
            view = file.stack_view(stored)
            if view is None and plane not in facts.padded_planes:
                view = np.stack([file.view(name) for name in stored])
            if view is None:
                return None
            planes[plane] = view
        return _layer(planes, facts)


def _layer(planes: dict[str, np.ndarray], facts: MatrixFacts) -> MdCSR:
    return MdCSR(
        **planes,
        shape=facts.shape,
        row_alignment=facts.row_alignment,
        dtype=facts.dtype,
        index=facts.index,
        value_bits=facts.value_bits,
        group_size=facts.group_size,
    )
