"""The unfinished result of a compression, from which a later run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax._mdcsr import MdCSR
from upg_jax.compress._plan import Plan, provenance
from upg_jax.compress._progress import Meter, Progress
from upg_jax.io import Checkpoint, UPGDecompressor, save
from upg_jax.io._atomic import replacing

_STATE = "state.json"
_CHUNK_BYTES = 1 << 22


class Partial:
    """`DST.partial`: a state file, one small UPG file per encoded tensor, and at the end the whole result.

    The state names the settings, the tool's version and the source files with their sizes, times and sha256;
    a run goes on only where all of them are the same, so that it ends with the bytes an undisturbed run would
    have.
    """

    def __init__(self, destination: Path) -> None:
        self.path = destination.with_name(destination.name + ".partial")
        self.output = self.path / "output"
        self.replaced = self.path / "replaced"
        self._parts = self.path / "parts"

    def open(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        restart: bool,
        report: Callable[[Progress], None] | None,
    ) -> dict[str, Any]:
        """Begins or goes on, hashing the sources where that is still to do; returns the result's provenance.

        Raises:
            CheckpointError: if the directory is from other settings or sources, or none of ours.
        """
        if restart:
            self._clear()
        state = self._read()
        files = checkpoint.source_files()
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        made = provenance(plan.settings, plan.calibration, [])
        if state is None:
            state = {key: made[key] for key in ("tool", "settings")} | {"times": None, "sources": None}
        for key in ("tool", "settings"):
            if state.get(key) != made[key]:
                raise CheckpointError(
                    f"compress: {self.path} is from a run with another {key}: "
                    f"{_difference(state.get(key), made[key])}; go on as it was begun, or begin anew with --restart "
                    "(restart=True)"
                )
        self._parts.mkdir(parents=True, exist_ok=True)
        times = [time for _, _, time in stats]
        if state["sources"] is None or state["times"] != times:
            self._write(state)
            meter = Meter("hash", sum(size for _, size, _ in stats), report)
            hashed = [(f.name, f.stat().st_size, _sha256(f, meter)) for f in files]
            sources = provenance(plan.settings, plan.calibration, hashed)["sources"]
            if state["sources"] not in (None, sources):
                raise CheckpointError(
                    f"compress: the source files are not those that {self.path} was begun with; begin anew "
                    "with --restart (restart=True)"
                )
            state |= {"times": times, "sources": sources}
            self._write(state)
        return made | {"sources": state["sources"]}

    def exists(self) -> bool:
        """Whether a run was begun and its traces, if only the empty directory, are still there."""
        self._read()
        return self.path.exists()

    def has_part(self, index: int, name: str) -> bool:
        """Whether a tensor is encoded already."""
        file = self._part(index)
        if not file.exists():
            return False
        with UPGDecompressor.from_safetensors(file) as part:
            return part.names() == [name]

    def write_part(self, index: int, name: str, layer: MdCSR) -> None:
        """Keeps an encoded tensor, safe from whatever happens next."""
        save(self._part(index), {name: layer})

    def read_part(self, index: int, name: str) -> MdCSR:
        """Maps an encoded tensor; the memory goes when the layer does."""
        with UPGDecompressor.from_safetensors(self._part(index)) as part:
            return part.get_layer(name, device=False)

    def remove(self) -> None:
        """Removes the directory, if it is one of ours."""
        if self._read() is not None:
            self._clear()
            self.path.rmdir()

    def _clear(self) -> None:
        """Empties the directory, if it is one of ours; the state goes last, so that this can be repeated."""
        if self._read() is None:
            return
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == _STATE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _part(self, index: int) -> Path:
        return self._parts / f"{index:05d}.safetensors"

    def _read(self) -> dict[str, Any] | None:
        """The state; None where there is no directory, or one that a run was stopped in before writing it."""
        if not self.path.exists():
            return None
        file = self.path / _STATE
        try:
            if not file.exists() and not [p for p in self.path.iterdir() if not self._ours_before_state(p)]:
                return None
            state = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(state, dict) and state.keys() >= {"tool", "settings", "times", "sources"}:
                return state
        except (OSError, ValueError):
            pass
        raise CheckpointError(
            f"compress: {self.path} exists and is not an unfinished compression; move it away or choose "
            "another name"
        )

    def _ours_before_state(self, path: Path) -> bool:
        return path.name.startswith(f".{_STATE}.") or (path == self._parts and not any(path.iterdir()))

    def _write(self, state: dict[str, Any]) -> None:
        with replacing(self.path / _STATE) as temporary:
            temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


class PartialTensors(Mapping[str, MdCSR | np.ndarray]):
    """Every tensor of the result, for `save`: encoded ones from their parts, dense ones from the source."""

    def __init__(self, partial: Partial, checkpoint: Checkpoint, plan: Plan, meter: Meter) -> None:
        self._partial = partial
        self._checkpoint = checkpoint
        self._tensors = {t.name: t for t in plan.tensors}
        self._index = {t.name: i for i, t in enumerate(plan.compressed)}
        self._meter = meter
        self._accesses: Counter[str] = Counter()

    def __getitem__(self, name: str) -> MdCSR | np.ndarray:
        self._count(name)
        if name in self._index:
            return self._partial.read_part(self._index[name], name)
        return self._checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _count(self, name: str) -> None:
        """`save` asks for a tensor once to describe it and once for every plane it writes."""
        tensor = self._tensors[name]
        planes = 1 if tensor.encoding is None else {"unit": 4, "prime": 5}[tensor.encoding.manifold]
        before, self._accesses[name] = self._accesses[name], self._accesses[name] + 1
        share = [tensor.nbytes * n // (1 + planes) for n in (before, before + 1)]
        self._meter.add(share[1] - share[0], name)


def _difference(before: Any, now: Any) -> str:
    """What of two values differs; of mappings and lists, which may be long, the first item that does."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in before | now if before.get(key) != now.get(key)]
        return "; ".join(f"{key} {_difference(before.get(key), now.get(key))}" for key in keys)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [pair for pair in zip(before, now, strict=True) if pair[0] != pair[1]]
        more = f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""
        return f"{pairs[0][0]!r}, now {pairs[0][1]!r}{more}"
    if isinstance(before, list) and isinstance(now, list):
        return f"{len(before)} in number, now {len(now)}"
    return f"{before!r}, now {now!r}"


def _sha256(path: Path, meter: Meter) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            meter.add(len(chunk), path.name)
    return digest.hexdigest()
