"""Tensors of a model on their way into one file, kept on disk instead of in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from upg_jax._mdcsr import MdCSR
from upg_jax.io._layout import describe, place
from upg_jax.io._metadata import to_strings
from upg_jax.io._reader import UPGDecompressor
from upg_jax.io._writer import write_file


class StagedTensors(Mapping[str, MdCSR | np.ndarray]):
    """A mapping for `save` that holds one tensor in memory at a time.

    Each tensor is a version 2 file of its own in a directory that the caller makes and removes. Looking one
    up maps its file anew, so that the memory goes when the tensor does.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}

    def add(self, name: str, tensor: MdCSR | jax.Array | np.ndarray) -> None:
        """Writes one tensor."""
        file = self._directory / f"{len(self._files)}.safetensors"
        one = {name: tensor}
        items = describe(one)
        facts = {item.name: item.facts for item in items if item.facts is not None}
        write_file(file, place(items), to_strings(facts, {}, None, None), one)
        self._files[name] = file

    def __getitem__(self, name: str) -> MdCSR | np.ndarray:
        with UPGDecompressor.from_safetensors(self._files[name]) as reader:
            if reader.info(name).kind == "mdcsr":
                return reader.get_layer(name, device=False)
            return np.asarray(reader.get_array(name, device=False))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
