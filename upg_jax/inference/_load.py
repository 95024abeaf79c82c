"""Opening whatever a model may come as, behind one reader of weights."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax._mdcsr import MdCSR
from upg_jax.inference._tokenizer import Tokenizer
from upg_jax.io import Checkpoint, UPGDecompressor, open_checkpoint
from upg_jax.io._atomic import temporary_directory
from upg_jax.io._header import read_header
from upg_jax.io._metadata import FORMAT
from upg_jax.io._open import open_regular
from upg_jax.models import WeightSource, can_stack

_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """What a model's files hold.

    Attributes:
        config: its configuration under Hugging Face's keys.
        source: its weights.
        tokenizer: None if it has none.
        generation: content of `generation_config.json`, empty if there is none.
    """

    config: dict[str, Any]
    source: WeightSource
    tokenizer: Tokenizer | None
    generation: dict[str, Any]


def open_model(path: str | os.PathLike[str], *, device: bool = True) -> OpenModel:
    """Opens a UPG model (file or directory), a Hugging Face directory or a GGUF file.

    Args:
        path: of the model.
        device: False leaves a UPG model's tensors views of the file.

    Raises:
        CheckpointError: if it is none of them, or lacks something.
        FormatError: if a UPG file is broken.
    """
    path = Path(path)
    if not _is_upg(path):
        return _open_source(open_checkpoint(path))
    file = UPGDecompressor.from_safetensors(path)
    if file.model is None:
        raise CheckpointError(
            f"{path}: holds layers but no model configuration (metadata 'model'); read its layers with "
            "UPGDecompressor, or compress a whole checkpoint with `upg-jax compress`"
        )
    directory = path if path.is_dir() else path.parent
    return OpenModel(file.model, _UPGSource(path, file, device), *_beside(directory))


def _is_upg(path: Path) -> bool:
    """Whether to read this as a UPG model; what is no safetensors goes to `open_checkpoint` and its messages."""
    if path.is_dir():
        path = min(path.glob("*.safetensors"), default=path)
    elif path.suffix in (".json", ".upg"):
        return True
    if path.suffix != ".safetensors" or not path.exists():
        return False
    with open_regular(path) as f:
        return read_header(f, path).metadata.get("format") == FORMAT


def _open_source(checkpoint: Checkpoint) -> OpenModel:
    source = _CheckpointSource(checkpoint)
    if checkpoint.path.is_dir():
        return OpenModel(checkpoint.config, source, *_beside(checkpoint.path))
    with temporary_directory("upg-jax-tokenizer-") as directory:
        checkpoint.write_tokenizer(directory)
        return OpenModel(checkpoint.config, source, *_beside(directory))


def _beside(directory: Path) -> tuple[Tokenizer | None, dict[str, Any]]:
    tokenizer = Tokenizer.from_directory(directory) if (directory / _TOKENIZER).exists() else None
    file = directory / "generation_config.json"
    if not file.is_file():
        return tokenizer, {}
    try:
        generation = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file}: is not JSON: {e}") from e
    return tokenizer, generation if isinstance(generation, dict) else {}


class _CheckpointSource:
    """A source checkpoint: every tensor is dense."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.where = str(checkpoint.path)
        self.names = checkpoint.names
        self.shape = checkpoint.shape
        self.read = checkpoint.read

    def read_all(self, names: Sequence[str]) -> tuple[Any, ...]:
        return tuple(self.read(name) for name in names)


class _UPGSource:
    """A UPG file: planes are views of the file wherever the device allows it, or as NumPy arrays."""

    def __init__(self, path: Path, file: UPGDecompressor, device: bool) -> None:
        self._file = file
        self._device = device
        self.where = str(path)
        self.names = file.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.info(name).shape

    def read(self, name: str) -> MdCSR | jax.Array | np.ndarray:
        if self._file.info(name).kind == "dense":
            return self._file.get_array(name, device=self._device)
        return self._file.get_layer(name, device=self._device)

    def read_all(self, names: Sequence[str]) -> MdCSR | tuple[Any, ...]:
        infos = [self._file.info(name) for name in names]
        if all(info.kind == "mdcsr" for info in infos):
            layers = [self._file.get_layer(name, device=False) for name in names]
            if can_stack(layers, [layer.capacity for layer in layers]):
                return self._file.get_stack(names, device=self._device)
        return tuple(self.read(name) for name in names)


def eos_token_ids(opened: OpenModel) -> tuple[int, ...]:
    """The tokens that end an answer: the generation defaults' if they name any, else the configuration's."""
    for value in (opened.generation.get("eos_token_id"), opened.config.get("eos_token_id")):
        ids = value if isinstance(value, list) else [value]
        found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
        if found:
            return found
    return ()
