"""Hugging Face directories (`config.json` and safetensors, in one file or in shards) as checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._errors import CheckpointError, FormatError
from upg_jax.io._checkpoint import already_compressed, layer_order, read_bytes, unknown_tensor
from upg_jax.io._header import DTYPES, Header, StoredTensor, read_header, strict_json
from upg_jax.io._metadata import FORMAT
from upg_jax.io._open import looks_like, open_regular
from upg_jax.io._text_model import text_model

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Everything a Hugging Face tokenizer may be made of, and the generation defaults that name its end tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class HuggingFaceCheckpoint:
    """A Hugging Face directory, of which text models are read alone; see `Checkpoint`."""

    def __init__(self, path: Path):
        self.path = path
        files = self._find_files()
        config = self._json(CONFIG)
        method = config.get("quantization_config")
        if method is not None:
            name = method.get("quant_method") if isinstance(method, dict) else method
            raise CheckpointError(
                f"{path}: the weights are quantized ({name!r}); use the original float checkpoint, or a GGUF "
                "file"
            )
        found: dict[str, tuple[Path, StoredTensor]] = {}
        for file, expected in files.items():
            header = self._header(file)
            self._check_listed(file, expected, header)
            found |= {name: (path / file, tensor) for name, tensor in header.tensors.items()}
        if not found:
            raise CheckpointError(f"{path}: the safetensors files hold no tensor")
        self.config: dict[str, Any]
        self.config, found, self.left_out = text_model(path / CONFIG, config, found)
        self._files = [path / CONFIG, *(path / file for file in files)]
        self._tensors = {name: found[name] for name in layer_order(found)}

    def names(self) -> list[str]:
        """Returns the tensors' names, in layer order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `(out_features, in_features)` for a linear layer."""
        return self._tensor(name)[1].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the tensor's stored dtype, bfloat16 as that of `ml_dtypes`."""
        file, tensor = self._tensor(name)
        dtype = DTYPES[tensor.dtype][1]
        if dtype is None:
            raise CheckpointError(
                f"{file}: tensor {name!r} is of dtype {tensor.dtype}, which NumPy cannot hold"
            )
        return dtype

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        file, tensor = self._tensor(name)
        return read_bytes(file, tensor.start, tensor.stop).view(self.dtype(name)).reshape(tensor.shape)

    def source_files(self) -> list[Path]:
        """Returns the configuration and the safetensors files."""
        return list(self._files)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Copies the tokenizer's files and returns their names; there may be none."""
        names = [name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        for name in names:
            with (self.path / name).open("rb") as f:
                start = f.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{self.path / name}: is {looks_like(start)}")
            shutil.copyfile(self.path / name, directory / name)
        return names

    def _tensor(self, name: str) -> tuple[Path, StoredTensor]:
        if name not in self._tensors:
            raise unknown_tensor(self.path, name, self._tensors)
        return self._tensors[name]

    def _find_files(self) -> Mapping[str, set[str] | None]:
        """The safetensors files, each with the names that the index lists for it (None without an index)."""
        names = {p.name for p in self.path.iterdir()}
        safetensors = sorted(n for n in names if n.endswith(".safetensors"))
        if CONFIG not in names:
            gguf = sorted(n for n in names if n.endswith(".gguf"))
            hint = f"; did you mean {self.path / gguf[0]}?" if gguf else ""
            raise CheckpointError(
                f"{self.path}: has no {CONFIG}, so it is not a Hugging Face checkpoint{hint}"
            )
        if INDEX in names:
            return self._listed_files(names)
        if SINGLE in names:
            return {SINGLE: None}
        if len(safetensors) == 1:
            return {safetensors[0]: None}
        if safetensors:
            raise CheckpointError(
                f"{self.path}: has {len(safetensors)} safetensors files ({', '.join(safetensors[:3])}, ...) "
                f"but no {INDEX} that says what is where; fetch it too"
            )
        if any(n.endswith((".bin", ".pth", ".pt")) for n in names):
            raise CheckpointError(
                f"{self.path}: has its weights only as PyTorch pickles, which can run code when read; "
                "convert them: transformers' `model.save_pretrained(directory)` writes safetensors"
            )
        raise CheckpointError(f"{self.path}: has a {CONFIG} but no weights ({SINGLE} or {INDEX})")

    def _listed_files(self, names: set[str]) -> Mapping[str, set[str] | None]:
        weight_map = self._json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(
                f"{self.path / INDEX}: must map tensor names to file names under 'weight_map'"
            )
        listed: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(
                    f"{self.path / INDEX}: tensor {name!r}: file names must have no directory; got {file!r}"
                )
            if file not in names:
                raise CheckpointError(f"{self.path / INDEX}: lists {file}, which is missing; fetch it too")
            listed.setdefault(file, set()).add(name)
        stray = sorted(
            n for n in names - set(listed) if n.startswith("model-") and n.endswith(".safetensors")
        )
        if stray:
            raise CheckpointError(
                f"{self.path / INDEX}: does not list {stray[0]}, which lies beside it; the index belongs to "
                "other files, or the file to another checkpoint"
            )
        return dict(sorted(listed.items()))

    def _header(self, file: str) -> Header:
        try:
            with open_regular(self.path / file) as f:
                header = read_header(f, self.path / file)
        except FormatError as e:
            raise CheckpointError(str(e)) from e
        if header.metadata.get("format") == FORMAT:
            raise already_compressed(self.path)
        return header

    def _check_listed(self, file: str, expected: set[str] | None, header: Header) -> None:
        if expected is None or expected == header.tensors.keys():
            return
        missing, unlisted = sorted(expected - header.tensors.keys()), sorted(header.tensors.keys() - expected)
        if missing:
            raise CheckpointError(
                f"{self.path / file}: has no tensor {missing[0]!r}, which {INDEX} says it holds"
            )
        raise CheckpointError(
            f"{self.path / file}: holds tensor {unlisted[0]!r}, which {INDEX} does not list there"
        )

    def _json(self, file: str) -> dict[str, Any]:
        where = self.path / file
        try:
            with open_regular(where) as f:
                text = f.read()
            known = looks_like(text[:64])
            value = None if known else strict_json(text, str(where))
        except FormatError as e:
            raise CheckpointError(str(e)) from e
        if known:
            raise CheckpointError(f"{where}: is {known}")
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: must hold a JSON object")
        return value
