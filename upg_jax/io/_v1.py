"""Converting version 1 files (pickles), with weights or without, to version 2."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upg_jax._errors import FormatError
from upg_jax._mdcsr import MANIFOLDS, Manifold
from upg_jax._version import __version__
from upg_jax.io._atomic import replacing, temporary_directory
from upg_jax.io._layout import describe as describe_layout
from upg_jax.io._layout import place
from upg_jax.io._metadata import to_strings
from upg_jax.io._pickle_values import describe
from upg_jax.io._reader import UPGDecompressor
from upg_jax.io._staging import StagedTensors
from upg_jax.io._unpickle import load
from upg_jax.io._v1_jobs import Catalogue, Job, Kind, Source, Weights
from upg_jax.io._writer import check_destination, write_file

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        kind: `"weights"` or `"catalogue"`.
        compressed: matrices written compressed.
        dense: tensors written dense.
        source_bytes: size of the version 1 file.
        written_bytes: size of the version 2 file.
    """

    kind: Kind
    compressed: int
    dense: int
    source_bytes: int
    written_bytes: int


def convert_v1(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    source: Source | None = None,
    manifold: Manifold = "unit",
    progress: Progress | None = None,
    force: bool = False,
) -> ConversionReport:
    """Converts a version 1 file to version 2, atomically, and verifies the result against the input.

    The pickle is never run (see `upg_jax.io._unpickle`). It is read whole, so its size is needed as memory,
    and announced; tensors are then converted one at a time, through a temporary directory beside `dst`.

    int8 matrices keep every weight's bits. Sparse float matrices are quantized. A catalogue has no weights:
    the matrices it lists are compressed from `source` at the sparsity it lists, on the manifold it lists;
    what it does not list stays dense.

    Args:
        src: the version 1 file.
        dst: the version 2 file to write.
        source: the original checkpoint, for a catalogue.
        manifold: what sparse float matrices are encoded to.
        progress: called with what happens, the tensors that are done, and how many there are.
        force: replace the file that `dst` already is.

    Returns:
        Counts and sizes.

    Raises:
        FormatError: naming file, tensor, row and rule, for a file that is not what it should be; also for a
            catalogue without `source`, saying how to go on, and for a `dst` that is in the way. `dst` is untouched.
    """
    src, dst = Path(src), Path(dst)
    if manifold not in MANIFOLDS:
        raise FormatError(f"convert: manifold must be one of {', '.join(MANIFOLDS)}; got {manifold!r}")
    if dst.exists() and os.path.samefile(src, dst):
        raise FormatError(f"convert: {dst} must not replace the file it is made from; choose another name")
    check_destination(dst, sharded=False)
    _check_new(dst, force)
    report = progress or (lambda message, done, total: None)
    size = src.stat().st_size
    report(f"reading {src.name} whole: needs {size:,} bytes of memory", 0, 0)
    content = load(src)
    job = _job(src, content, source, manifold)
    provenance = {
        "tool": f"upg_jax {__version__}",
        "settings": {"operation": "convert", "manifold": manifold},
        "sources": [_source_file(path) for path in (src, *job.source_files())],
        "v1": {key: value for key, value in content.items() if isinstance(key, str) and _is_plain(value)},
    }
    names = job.names()
    with (
        replacing(dst) as temporary,
        temporary_directory(f".{dst.name}.", dst.parent) as staging,
    ):
        staged = StagedTensors(staging)
        for done, name in enumerate(names):
            report(f"converting {name}", done, len(names))
            staged.add(name, job.convert(name))
        items = describe_layout(staged)
        facts = {item.name: item.facts for item in items if item.facts is not None}
        write_file(temporary, place(items), to_strings(facts, {}, job.model(), provenance), staged)
        with UPGDecompressor.from_safetensors(temporary) as written:
            if sorted(written.names()) != sorted(names):
                raise FormatError(f"{src}: verification: the tensors written are not those of the input")
            for done, name in enumerate(names):
                report(f"verifying {name}", done, len(names))
                job.verify(name, written)
            written.verify()
        _check_new(dst, force)  # again, since another run may have made it meanwhile
    report("done", len(names), len(names))
    return ConversionReport(job.kind, len(facts), len(names) - len(facts), size, dst.stat().st_size)


def _check_new(dst: Path, force: bool) -> None:
    if dst.exists() and not force:
        raise FormatError(
            f"convert: {dst} exists already; choose another name, or replace it with --force (force=True)"
        )


def _job(src: Path, content: Any, source: Source | None, manifold: Manifold) -> Job:
    if not isinstance(content, dict):
        raise FormatError(f"{src}: a version 1 file must hold a dict; got {describe(content)}")
    if "tensors" in content:
        return Weights(src, content["tensors"], manifold)
    if "files" in content:
        return Catalogue(src, content["files"], source)
    keys = ", ".join(describe(key) for key in list(content)[:10])
    raise FormatError(
        f"{src}: a version 1 file must have 'tensors' (weights) or 'files' (a catalogue); its keys are "
        f"{keys or 'none'}"
    )


def _source_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
