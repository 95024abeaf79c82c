"""The unfinished training, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax.io._atomic import replacing

_FILE = "training.safetensors"


class TrainingCheckpoint:
    """`OUT.partial`: weights and optimizer after some step, with what the training was begun with."""

    def __init__(self, destination: Path, begun_with: dict[str, Any]) -> None:
        self.path = self.path_of(destination)
        self.output = self.path / "output"
        self._file = self.path / _FILE
        self._begun_with = json.loads(json.dumps(begun_with))

    @staticmethod
    def path_of(destination: Path) -> Path:
        """The directory of a destination's unfinished training."""
        return destination.with_name(destination.name + ".partial")

    def open(self, restart: bool) -> None:
        """Makes the directory, or empties one of ours if it is to be begun anew.

        Raises:
            CheckpointError: if there is something else in its place.
        """
        if self.path.exists():
            others = [
                p for p in self.path.iterdir() if p not in (self._file, self.output) and p.suffix != ".tmp"
            ]
            if others:
                raise CheckpointError(
                    f"recover: {self.path} exists and is not an unfinished training; move it away or choose "
                    "another name"
                )
            if restart:
                self._clear()
        self.path.mkdir(exist_ok=True)

    def write(self, tree: Any, facts: dict[str, Any]) -> None:
        """Keeps a state; the one before stays until it is complete."""
        from safetensors.numpy import save_file

        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        tensors = {jax.tree_util.keystr(path): np.array(leaf, order="C") for path, leaf in leaves}
        metadata = {"training": json.dumps(facts), "begun_with": json.dumps(self._begun_with)}
        with replacing(self._file) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def read(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The kept state and its facts; None if there is none.

        Args:
            like: a tree of the same structure, shapes and dtypes.

        Raises:
            CheckpointError: if it was begun otherwise, or is not readable.
        """
        if not self._file.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file, framework="np") as file:
                metadata = file.metadata() or {}
                begun_with = json.loads(metadata.get("begun_with", "null"))
                if begun_with != self._begun_with:
                    raise CheckpointError(
                        f"recover: {self.path} was begun with {_difference(begun_with, self._begun_with)}; go on as it "
                        "was begun, or begin anew with --restart (restart=True)"
                    )
                leaves, structure = jax.tree_util.tree_flatten_with_path(like)
                found = [file.get_tensor(jax.tree_util.keystr(path)) for path, _ in leaves]
        except (SafetensorError, ValueError, OSError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(
                f"recover: {self._file} cannot be read ({e}); begin anew with --restart (restart=True)"
            ) from e
        return jax.tree.unflatten(structure, found), json.loads(metadata["training"])

    def remove(self) -> None:
        """Removes the directory."""
        self._clear()
        self.path.rmdir()

    def _clear(self) -> None:
        # Not the directory itself: it has the lock.
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _difference(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "something else"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} (now {new.get(key)!r})" for key in keys)
