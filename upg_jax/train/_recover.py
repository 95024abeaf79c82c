"""From a compressed model to a better one of the same size."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import CheckpointError, FormatError
from upg_jax._mdcsr import MdCSR
from upg_jax._precision import best_precision
from upg_jax._version import __version__
from upg_jax.inference import UPGModel
from upg_jax.io import UPGDecompressor, save
from upg_jax.io._locked import locked
from upg_jax.train._checkpoint import TrainingCheckpoint
from upg_jax.train._network import Student, Teacher
from upg_jax.train._settings import RecoveryProgress, RecoverySettings
from upg_jax.train._step import optimizer, train_step
from upg_jax.train._text import TokenWindows

_MODEL = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        path: the new model's directory.
        steps: of training, those of earlier runs included.
        tokens: trained on.
        seconds: of training.
        last: the last step's progress; None if nothing was left to do.
    """

    path: Path
    steps: int
    tokens: int
    seconds: float
    last: RecoveryProgress | None


def recover(
    model: str | os.PathLike[str],
    dense: str | os.PathLike[str],
    texts: Iterable[str],
    destination: str | os.PathLike[str],
    settings: RecoverySettings,
    *,
    progress: Callable[[RecoveryProgress], None] | None = None,
    restart: bool = False,
    force: bool = False,
) -> Recovered:
    """Trains what a compressed model stores to predict as the dense model does, and encodes it again.

    Stored weights, norms and biases are trained; which weights are stored, embedding and head stay as they are. Stopped
    at any point, the same call goes on from the last checkpoint in `DESTINATION.partial`.

    Args:
        model: a directory that `upg-jax compress` made.
        dense: the model it was made from, or another with its vocabulary: a Hugging Face directory or a GGUF file.
        texts: to train on, put one after another.
        destination: the directory to make.
        settings: how to train.
        progress: called after every step.
        restart: forget an earlier run's unfinished work.
        force: replace the compressed model that `destination` already is.

    Raises:
        CheckpointError: for models that do not fit each other, unfinished work from other settings, another run at
            work, or a destination that is in the way.
        MissingDependencyError: without optax.
    """
    model, destination = Path(os.path.realpath(model)), Path(os.path.realpath(destination))
    _check_places(model, destination, force)
    with locked(TrainingCheckpoint.path_of(destination), "recover"):
        _check_places(model, destination, force)  # again, since a run that has just ended may have made it
        optimizer(settings.clip)  # its package is missing at once, or never
        precision = settings.precision or best_precision()
        student, teacher, encode = _networks(model, dense, precision)
        ids = np.concatenate([np.asarray(encode(text), np.int32) for text in texts])
        windows = TokenWindows(ids, settings.window, settings.batch * settings.micro_batches, settings.seed)
        begun_with = {
            "tool": f"upg_jax {__version__}",
            "settings": settings.to_json(),
            "precision": precision,
            "text": windows.to_json(),
            "model": _provenance(model),
            "dense": os.fspath(dense),
        }
        checkpoint = TrainingCheckpoint(destination, begun_with)
        checkpoint.open(restart)
        loop = _Loop(student, teacher, windows, settings, checkpoint)
        last = loop.run(progress)
        made = {**begun_with, "steps": loop.step, "seconds": round(loop.seconds, 1)}
        _write(model, checkpoint.output, student.with_trained(loop.trained).tensors(), made)
        if destination.exists():
            shutil.rmtree(destination)
        checkpoint.output.rename(destination)
        checkpoint.remove()
        return Recovered(destination, loop.step, loop.step * settings.step_tokens, loop.seconds, last)


class _Loop:
    """Steps until the budget is spent, with checkpoints on the way and where it is interrupted."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        windows: TokenWindows,
        settings: RecoverySettings,
        checkpoint: TrainingCheckpoint,
    ) -> None:
        self._rest, self._teacher, self._windows = student.without_trained(), teacher, windows
        self._settings, self._checkpoint = settings, checkpoint
        # Copies, since a step gives its arguments' memory to its results.
        self.trained = jax.jit(partial(jax.tree.map, jnp.copy))(student.trained())
        self._state = jax.jit(optimizer(settings.clip).init)(self.trained)
        self.step, self.seconds = 0, 0.0
        kept = checkpoint.read((self.trained, self._state))
        if kept is not None:
            (self.trained, self._state), facts = jax.tree.map(jnp.asarray, kept[0]), kept[1]
            self.step, self.seconds = facts["step"], facts["seconds"]

    def run(self, report: Callable[[RecoveryProgress], None] | None) -> RecoveryProgress | None:
        first_step = self.step
        try:
            # An interrupt comes to the main thread; this one ends its step, so that what is kept is whole steps.
            with ThreadPoolExecutor(1) as steps:
                return self._steps(steps, report)
        finally:
            # What a failed step was given is gone; then the last checkpoint stays.
            given = jax.tree.leaves((self.trained, self._state))
            if self.step > first_step and not any(leaf.is_deleted() for leaf in given):
                self._save()

    def _steps(
        self, steps: ThreadPoolExecutor, report: Callable[[RecoveryProgress], None] | None
    ) -> RecoveryProgress | None:
        settings, before, first_step = self._settings, self.seconds, self.step
        begin = saved = time.monotonic()
        first_end: float | None = None
        last = None
        while (spent := settings.spent(self.seconds, self.step * settings.step_tokens)) < 1:
            ids = self._windows[self.step].reshape(settings.micro_batches, settings.batch, -1)
            rate = settings.rate(max(spent, settings.warmup / 20))  # the first step would learn nothing
            total, kl, nll = steps.submit(self._take, ids, rate, begin - before).result()
            now = time.monotonic()
            first_end = first_end or now
            timed = self.step - first_step - 1
            per_second = timed * settings.step_tokens / (now - first_end) if timed else 0.0
            tokens = self.step * settings.step_tokens
            spent = settings.spent(self.seconds, tokens)
            elapsed = self.seconds - before
            gained = spent - settings.spent(before, first_step * settings.step_tokens)
            remaining = max(1 - spent, 0.0) * elapsed / gained if timed and gained > 0 else None
            last = RecoveryProgress(
                self.step, tokens, self.seconds, spent, total, kl, nll, rate, per_second, remaining
            )
            if report is not None:
                report(last)
            if now - saved > 60 * settings.checkpoint_minutes and spent < 1:
                self._save()
                saved = time.monotonic()
        return last

    def _take(self, ids: np.ndarray, rate: float, since: float) -> tuple[float, ...]:
        """One step; returns its losses."""
        trained, state, losses = train_step(
            self.trained,
            self._state,
            self._rest,
            self._teacher,
            jnp.asarray(ids),
            jnp.float32(rate),
            weights=(self._settings.distillation, self._settings.language_model),
            clip=self._settings.clip,
        )
        values = tuple(float(loss) for loss in losses)
        self.trained, self._state = trained, state
        self.step, self.seconds = self.step + 1, time.monotonic() - since
        return values

    def _save(self) -> None:
        self._checkpoint.write((self.trained, self._state), {"step": self.step, "seconds": self.seconds})


def _networks(
    model: Path, dense: str | os.PathLike[str], precision: str
) -> tuple[Student, Teacher, Callable[[str], list[int]]]:
    compressed = UPGModel.from_file(model, pack=False)
    source = UPGModel.from_file(dense, pack=False)
    if source.config.vocab_size != compressed.config.vocab_size:
        raise CheckpointError(
            f"recover: both models must have one vocabulary; got {compressed.config.vocab_size} tokens in {model} and "
            f"{source.config.vocab_size} in {os.fspath(dense)}"
        )
    student = Student.from_model(compressed, precision=precision)
    return student, Teacher.from_model(source, precision=precision), compressed.encode


def _check_places(model: Path, destination: Path, force: bool) -> None:
    if not model.is_dir():
        raise CheckpointError(f"recover: {model} must be the directory of a compressed model")
    if destination == model or destination.is_relative_to(model) or model.is_relative_to(destination):
        raise CheckpointError(
            f"recover: the result must not lie in the model or around it; got {model} and {destination}"
        )
    if not destination.parent.is_dir():
        raise CheckpointError(f"recover: the directory {destination.parent} does not exist; make it first")
    if not destination.exists():
        return
    try:
        with UPGDecompressor.from_safetensors(destination / _MODEL):
            pass
    except (FormatError, OSError):
        raise CheckpointError(
            f"recover: {destination} exists and is not a compressed model; choose another name or remove it"
        ) from None
    if not force:
        raise CheckpointError(
            f"recover: {destination} is a compressed model already; choose another name, or replace it with --force "
            "(force=True)"
        )


def _provenance(model: Path) -> dict[str, Any] | None:
    with UPGDecompressor.from_safetensors(model) as file:
        return file.provenance


class _Tensors(Mapping[str, MdCSR | np.ndarray]):
    """Every tensor of the result: the trained ones, and the others from the model it began with."""

    def __init__(self, file: UPGDecompressor, trained: Mapping[str, Any]) -> None:
        self._file, self._trained = file, trained

    def __getitem__(self, name: str) -> Any:
        info = self._file.info(name)
        if name not in self._trained:
            read = self._file.get_layer if info.kind == "mdcsr" else self._file.get_array
            return read(name, device=False)
        value = self._trained[name]
        return value if isinstance(value, MdCSR) else np.asarray(value.astype(info.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.names())

    def __len__(self) -> int:
        return len(self._file.names())


def _write(model: Path, output: Path, trained: Mapping[str, Any], made: dict[str, Any]) -> None:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    with UPGDecompressor.from_safetensors(model) as file:
        provenance = {**(file.provenance or {}), "recovery": {k: v for k, v in made.items() if k != "model"}}
        save(output / _MODEL, _Tensors(file, trained), model=file.model, provenance=provenance)
    for other in sorted(model.iterdir()):
        if other.is_file() and ".safetensors" not in other.name:
            shutil.copyfile(other, output / other.name)
