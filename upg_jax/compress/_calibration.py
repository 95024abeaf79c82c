"""Text to calibrate on: from files, directories and data sets on disk to windows of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._errors import CheckpointError, MissingDependencyError

# Windows are drawn from a stream of up to this many times their tokens, so that a large corpus is not tokenized whole.
_STREAM = 16
_DATASET_FILES = ("state.json", "dataset_dict.json")
_TABLES = (".parquet", ".jsonl", ".arrow")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Tokens that a model runs over to see which weights matter.

    Attributes:
        ids: int32 `(windows, tokens)`.
        source: where they are from, for the result's provenance.
    """

    ids: np.ndarray
    source: str

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"calibration: ids must be integers (windows, tokens), at least one; got {ids.dtype} {ids.shape}"
            )
        object.__setattr__(self, "ids", np.ascontiguousarray(ids, np.int32))

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        encode: Callable[[str], Sequence[int]],
        *,
        windows: int = 64,
        tokens: int = 512,
        seed: int = 0,
        source: str = "texts",
    ) -> Calibration:
        """Draws windows at random from texts put one after another; deterministic for a seed.

        Args:
            texts: what to draw from; read until there are 16 times the tokens needed.
            encode: a tokenizer's function from text to ids.
            windows: how many to draw; all that there are if there are fewer.
            tokens: of a window.
            seed: of the draw.
            source: says where the texts are from.

        Raises:
            ValueError: if the texts do not fill a window, or no tokens are asked for.
        """
        for name, value in {"windows": windows, "tokens": tokens}.items():
            if value < 1:
                raise ValueError(f"calibration: {name} must be at least 1; got {value}")
        stream: list[int] = []
        for text in texts:
            stream.extend(encode(text))
            if len(stream) >= _STREAM * windows * tokens:
                break
        whole = len(stream) // tokens
        if whole == 0:
            raise ValueError(f"calibration: the text must have at least {tokens} tokens; got {len(stream)}")
        ids = np.asarray(stream[: whole * tokens], np.int32).reshape(whole, tokens)
        chosen = np.random.default_rng(seed).permutation(whole)[:windows]
        return cls(ids[np.sort(chosen)], source)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file's provenance."""
        windows, tokens = self.ids.shape
        return {
            "source": self.source,
            "windows": windows,
            "tokens": tokens,
            "sha256": hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest(),
        }


def default_texts() -> list[str]:
    """Entries of the Jargon File's lexicon, in the public domain; none of them is in the demo's text."""
    data = importlib.resources.files("upg_jax").joinpath("_data/jargon_lexicon_4.4.7.txt")
    return [data.read_text("utf-8")]


def read_texts(path: str | Path, column: str = "text") -> Iterator[str]:
    """Reads texts one by one.

    Args:
        path: a UTF-8 text file; a directory with `.txt` files, in the order of their names, at any depth; or a Hugging
            Face data set on disk: what `Dataset.save_to_disk` wrote, or a directory of Parquet or JSON lines files.
        column: of a data set, the one with the text.

    Raises:
        CheckpointError: if there is no text at the path, or the data set has no such column.
        MissingDependencyError: for a data set, without the package `datasets`.
    """
    path = Path(path)
    if path.is_file():
        yield _read_file(path)
        return
    files = sorted(path.rglob("*.txt")) if path.is_dir() else []
    if any((path / name).exists() for name in _DATASET_FILES) or (
        path.is_dir() and any(f.suffix in _TABLES for f in path.rglob("*"))
    ):
        yield from _read_dataset(path, column)
    elif files:
        yield from map(_read_file, files)
    else:
        raise CheckpointError(
            f"calibration: {path} must be a text file, a directory with .txt files, or a Hugging Face data set"
        )


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"calibration: {file} must be UTF-8 text; {e}") from None


def _read_dataset(path: Path, column: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as e:
        raise MissingDependencyError(
            'calibration: data sets need the package datasets; pip install "upg-jax[data]"'
        ) from e
    saved = any((path / name).exists() for name in _DATASET_FILES)
    found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), streaming=True)
    splits = found.values() if hasattr(found, "values") else [found]
    for split in splits:
        for row in split:
            if column not in row:
                raise CheckpointError(
                    f"calibration: {path} has no column {column!r}; it has {', '.join(map(repr, row))}"
                )
            yield row[column]
