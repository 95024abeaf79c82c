"""What a source checkpoint offers, whatever file format it is in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax.io._open import looks_like


class Checkpoint(Protocol):
    """A language model's original weights, read one tensor at a time.

    Attributes:
        path: the directory or file it was opened from.
        config: the model's description under the keys of Hugging Face's `config.json`.
        left_out: names of tensors that are not offered, since they belong to no model of text.
    """

    path: Path
    config: dict[str, Any]
    left_out: list[str]

    def names(self) -> list[str]:
        """Returns the tensors' Hugging Face names, in layer order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape; a linear layer's is `(out_features, in_features)`."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives; bfloat16 is that of `ml_dtypes`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in memory bounded by that tensor."""
        ...

    def source_files(self) -> list[Path]:
        """Returns every file that the weights and the configuration come from."""
        ...

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Writes the tokenizer's files under their Hugging Face names and returns those names."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face directory or a GGUF file.

    Args:
        path: a directory with `config.json` and safetensors, or a `.gguf` file.

    Raises:
        CheckpointError: if it is neither, saying what it is and what to do.
    """
    # The readers import the protocol's helpers from here.
    from upg_jax.io._gguf import GGUFCheckpoint
    from upg_jax.io._huggingface import HuggingFaceCheckpoint

    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"open_checkpoint: {path} does not exist; give a Hugging Face directory (config.json and "
            "*.safetensors) or a .gguf file"
        )
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.is_file():
        raise CheckpointError(f"open_checkpoint: {path} is neither a directory nor a regular file")
    with path.open("rb") as f:
        start = f.read(64)
    if start[:4] == b"GGUF":
        return GGUFCheckpoint(path)
    raise CheckpointError(f"open_checkpoint: {path} {_what_to_do(path, start)}")


def _what_to_do(path: Path, start: bytes) -> str:
    known = looks_like(start)
    if known is not None:
        return f"is {known}"
    if path.suffix == ".safetensors":
        return f"is one file of a checkpoint; give the directory that also holds config.json: {path.parent}"
    return (
        "is not a checkpoint; give a Hugging Face directory (config.json and *.safetensors) or a .gguf file"
    )


def read_bytes(path: Path, start: int, stop: int) -> np.ndarray:
    """Reads a range of a file into memory of its own.

    Not a map: a stream of tensors through a map would stay resident, and a file cut short would end the
    process.
    """
    raw = np.fromfile(path, np.uint8, count=stop - start, offset=start)
    if raw.size != stop - start:
        raise CheckpointError(f"{path}: became shorter while it was read; fetch it again")
    return raw


def already_compressed(path: Path) -> CheckpointError:
    """The error for a model that this package wrote."""
    return CheckpointError(
        f"open_checkpoint: {path} holds a UPG model, which is compressed already; use it with "
        "`upg-jax generate` or UPGModel.from_file, and compress again from the original checkpoint"
    )


def layer_order(names: Iterable[str]) -> list[str]:
    """Sorts tensor names so that `layers.10` follows `layers.9`."""

    def part(text: str) -> tuple[bool, int, str]:
        # Of two numbers the longer is larger; `int` refuses to read thousands of digits.
        digits = text.lstrip("0") if text.isdecimal() else ""
        return text.isdecimal(), len(digits), digits or text

    def key(name: str) -> list[tuple[bool, int, str]]:
        return [part(text) for text in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def unknown_tensor(where: Path, name: str, known: Iterable[str]) -> CheckpointError:
    """The error for a tensor name that the checkpoint does not have."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; the closest are {', '.join(close)}" if close else ""
    return CheckpointError(f"{where}: has no tensor {name!r}{hint}")
