"""From a checkpoint to a compressed model directory, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._errors import CheckpointError, EncodingError, FormatError
from upg_jax._mdcsr import MdCSR
from upg_jax.compress._calibration import Calibration
from upg_jax.compress._methods import compress_matrix
from upg_jax.compress._partial import Partial, PartialTensors
from upg_jax.compress._plan import Plan, bits_per_weight, linears, plan
from upg_jax.compress._progress import Meter, Progress
from upg_jax.compress._prune import CALIBRATED
from upg_jax.compress._settings import Encoding, Settings
from upg_jax.io import Checkpoint, UPGDecompressor, open_checkpoint, save
from upg_jax.io._locked import locked

MODEL = "model.safetensors"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: its name.
        shape: its shape.
        encoding: what it is stored as; None if it stayed dense.
        density: nonzero weights over all weights; None if it stayed dense.
        nbytes: bytes in the file, padding tails included.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding | None
    density: float | None
    nbytes: int

    @property
    def num_weights(self) -> int:
        """Elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file per element."""
        return 8 * self.nbytes / max(self.num_weights, 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compression made.

    Attributes:
        path: the directory.
        tensors: one entry per tensor, in layer order.
        file_bytes: size of its `model.safetensors`.
        tokenizer_files: names of the tokenizer's files in it.
        resumed: how many tensors an earlier run had encoded.
        warnings: the plan's.
    """

    path: Path
    tensors: list[TensorReport]
    file_bytes: int
    tokenizer_files: list[str]
    resumed: int
    warnings: list[str]

    @property
    def compressed(self) -> list[TensorReport]:
        """The tensors that were encoded."""
        return [t for t in self.tensors if t.encoding is not None]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the linear layers that were encoded, all overheads included."""
        return bits_per_weight(linears(self.tensors))


def compress_checkpoint(
    source: str | Path | Checkpoint,
    destination: str | Path,
    settings: Settings,
    *,
    calibration: Calibration | None = None,
    progress: Callable[[Progress], None] | None = None,
    restart: bool = False,
    force: bool = False,
    spill: bool = False,
) -> Report:
    """Compresses a checkpoint into a new directory with `model.safetensors`, `config.json` and the tokenizer.

    One tensor at a time is in memory. Work in progress lies in `DESTINATION.partial`; stopped at any point,
    the same call goes on there and ends with the same bytes. The directory takes its name when complete.

    Args:
        source: a Hugging Face directory, a GGUF file, or an opened checkpoint.
        destination: the directory to make.
        settings: how to compress.
        calibration: tokens to run the model over, for the methods that need them; the whole model is never in memory,
            but the activations of one block are.
        progress: called often, with the stage's bytes, rate and time left.
        restart: forget an earlier run's unfinished work.
        force: replace the compressed model that `destination` already is.
        spill: keep the activations in files beside the unfinished work instead of in memory.

    Raises:
        CheckpointError: for a source that cannot be read, unfinished work from other settings or sources, or
            a destination that is in the way.
        EncodingError: for rules that match nothing, weights that cannot be encoded (naming the tensor), or a
            calibration that is missing, or not of this model.
    """
    # Through symbolic links, which a rename would replace instead of what they point to.
    destination = Path(os.path.realpath(destination))
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    if (calibration is None) == (settings.method in CALIBRATED):
        raise EncodingError(
            f"compress: calibration is for the methods {' and '.join(CALIBRATED)}, which need it; got method "
            f"{settings.method!r} {'without' if calibration is None else 'with'} it"
        )
    planned = plan(checkpoint, settings, calibration)
    if calibration is not None:
        from upg_jax.compress._calibrated import check_tokens

        check_tokens(checkpoint, planned, calibration)
    _check_place(checkpoint, destination)
    partial = Partial(destination)
    may_exist = force or partial.exists()
    with locked(partial.path, "compress"):
        if partial.replaced.exists() and not destination.exists():
            partial.replaced.rename(destination)
        _check_destination(destination, may_exist)
        made = partial.open(checkpoint, planned, restart, progress)
        if _provenance(destination) == made and not partial.output.exists() and not force:
            # The run before was stopped between naming its result and removing what it was made of.
            return _finish(destination, planned, partial, resumed=len(planned.compressed))
        if destination.exists() and not force:
            raise _in_the_way(destination)
        shutil.rmtree(partial.output, ignore_errors=True)
        partial.output.mkdir()
        checkpoint.write_tokenizer(partial.output)
        resumed = _encode_all(checkpoint, planned, partial, progress, partial.path if spill else None)
        _write_output(checkpoint, planned, partial, made, progress)
        if destination.exists():
            shutil.rmtree(partial.replaced, ignore_errors=True)
            destination.rename(partial.replaced)
        partial.output.rename(destination)
        _sync_directory(destination.parent)
        return _finish(destination, planned, partial, resumed)


def _encode_all(
    checkpoint: Checkpoint,
    planned: Plan,
    partial: Partial,
    progress: Callable[[Progress], None] | None,
    spill: Path | None,
) -> int:
    """Encodes the tensors that have no part yet; returns how many had one."""
    nbytes = [t.num_weights * checkpoint.dtype(t.name).itemsize for t in planned.compressed]
    meter = Meter("encode", sum(nbytes), progress)
    done = [partial.has_part(i, t.name) for i, t in enumerate(planned.compressed)]
    meter.skip(sum(n for n, finished in zip(nbytes, done, strict=True) if finished))
    index = {t.name: i for i, t in enumerate(planned.compressed)}

    def write_part(name: str, layer: MdCSR) -> None:
        partial.write_part(index[name], name, layer)
        meter.add(nbytes[index[name]], name)

    if planned.calibration is not None:
        from upg_jax.compress._calibrated import encode_in_order

        def read_part(name: str) -> MdCSR | None:
            i = index[name]
            return partial.read_part(i, name) if partial.has_part(i, name) else None

        encode_in_order(checkpoint, planned, read_part, write_part, spill)
        return sum(done)
    for tensor, finished in zip(planned.compressed, done, strict=True):
        assert tensor.encoding is not None
        if finished:
            continue
        w = checkpoint.read(tensor.name)
        try:
            layer = compress_matrix(w, tensor.encoding, planned.settings, None)
        except EncodingError as e:
            raise EncodingError(f"compress: tensor {tensor.name!r}: {e}") from e
        write_part(tensor.name, layer)
    return sum(done)


def _write_output(
    checkpoint: Checkpoint,
    planned: Plan,
    partial: Partial,
    made: dict[str, Any],
    progress: Callable[[Progress], None] | None,
) -> None:
    config = json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n"
    (partial.output / CONFIG).write_text(config, encoding="utf-8")
    meter = Meter("write", sum(t.nbytes for t in planned.tensors), progress)
    tensors = PartialTensors(partial, checkpoint, planned, meter)
    save(partial.output / MODEL, tensors, model=checkpoint.config, provenance=made)
    for file in partial.output.iterdir():
        if file.name != MODEL:
            with file.open("rb+") as f:
                os.fsync(f.fileno())
    _sync_directory(partial.output)


def _check_place(checkpoint: Checkpoint, destination: Path) -> None:
    source = Path(os.path.realpath(checkpoint.path))
    if destination == source or source.is_relative_to(destination) or destination.is_relative_to(source):
        raise CheckpointError(
            f"compress: the result must not lie in the source or around it; got {source} and {destination}"
        )
    if not destination.parent.is_dir():
        raise CheckpointError(f"compress: the directory {destination.parent} does not exist; make it first")


def _check_destination(destination: Path, may_exist: bool) -> None:
    if destination.exists():
        if _provenance(destination) is None:
            raise CheckpointError(
                f"compress: {destination} exists and is not a compressed model; choose another name or "
                "remove it"
            )
        if not may_exist:
            raise _in_the_way(destination)


def check_destination(checkpoint: Checkpoint, destination: Path, force: bool) -> None:
    """What ends `compress_checkpoint` before it begins, for those who work long before they call it.

    Raises:
        CheckpointError: if the destination is in the way, or lies in the source.
    """
    destination = Path(os.path.realpath(destination))
    _check_place(checkpoint, destination)
    _check_destination(destination, force or Partial(destination).exists())


def _in_the_way(destination: Path) -> CheckpointError:
    return CheckpointError(
        f"compress: {destination} is a compressed model already; choose another name, or replace it with "
        "--force (force=True)"
    )


def _provenance(directory: Path) -> dict[str, Any] | None:
    """What a compressed model's directory says of its making; None for anything else."""
    try:
        with UPGDecompressor.from_safetensors(directory / MODEL) as model:
            return model.provenance
    except (FormatError, OSError):
        return None


def _finish(path: Path, planned: Plan, partial: Partial, resumed: int) -> Report:
    """Measures the result, and last of all removes what it was made of."""
    tensors = []
    with UPGDecompressor.from_safetensors(path / MODEL) as model:
        for t in planned.tensors:
            info = model.info(t.name)
            density = None if info.true_nnz is None else info.true_nnz / max(info.num_weights, 1)
            tensors.append(TensorReport(t.name, info.shape, t.encoding, density, info.stored_bytes))
    others = sorted(p.name for p in path.iterdir() if p.name not in (MODEL, CONFIG))
    report = Report(path, tensors, (path / MODEL).stat().st_size, others, resumed, planned.warnings)
    partial.remove()
    return report


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
