"""Raw rows: one JSON object a line, each with a `topic` and what was measured: commit, changes to it, native library.

The first row of a run says when and where, too.
"""

from __future__ import annotations

import collections
import datetime
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upg_jax import _native
from upg_jax.cli._doctor import collect
from upg_jax.cli._measure import quartiles, usable_threads

ROOT = Path(__file__).parents[1]
PEERS = ("scipy", "sparse_dot_mkl", "mkl", "torch", "llama-cpp-python")
_FLAGS = ("avx", "fma", "f16c", "amx", "asimd", "sve", "gfni")


def environment(**more: Any) -> dict[str, Any]:
    """Date, versions, processor with its flags and caches, threads and load."""
    return {
        "topic": "environment",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **built(),
        **collect(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "flags": sorted(flag for flag in _cpu_flags() if flag.startswith(_FLAGS)),
        "caches": _caches(),
        "threads": usable_threads(),
        "load": os.getloadavg(),
        **more,
    }


@functools.cache
def built() -> dict[str, Any]:
    """What is measured: the commit, whether the tree beside the documentation differed from it, the native library."""
    git = ("git", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    library = _native.library_path()
    return {
        "commit": _output(*git, "rev-parse", "--short", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "native": hashlib.sha256(library.read_bytes()).hexdigest()[:12] if library else None,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def _caches() -> dict[str, str]:
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (cache.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


class Writer:
    """Appends rows to a file, each as soon as it is measured and with what was measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            print(json.dumps(_rounded(row | built())), file=file)


def _rounded(value: Any) -> Any:
    """Times to a tenth of a microsecond: what a clock tells, and half the file."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 7) if isinstance(value, float) and abs(value) < 1e3 else value


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of some files, plain or gzipped; each gets what its run's environment says where it does not itself.

    A case that was measured several times is one row with all calls: a busy minute of the machine is not the result.
    Its `runs` are the calls of each time, its `builds` what was measured, in words.
    """
    return list(_pooled(row for path in paths for row in _complete(_lines(path))))


def _pooled(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the same topic, case and threads as one, where the first of them is."""
    known: dict[str, dict[str, Any]] = {}
    others = []
    for row in rows:
        if "seconds" not in row:
            others.append(row)
            continue
        key = json.dumps([row["topic"], row["threads"], row["case"]], sort_keys=True)
        if key not in known:
            known[key] = row | {"seconds": {}, "runs": [], "builds": []}
        known[key]["runs"].append(row["seconds"])
        known[key]["builds"].append(_build(row))
        for name, calls in row["seconds"].items():
            known[key]["seconds"].setdefault(name, []).extend(calls)
    yield from others
    yield from known.values()


def _build(row: dict[str, Any]) -> str:
    changed = " with changes" if row.get("dirty") else ""
    library = f", native library {row['native']}" if row.get("native") else ""
    return f"commit {row.get('commit')}{changed}{library}"


def builds(rows: Iterable[dict[str, Any]]) -> str:
    """What the rows were measured of; says so where it is not all the same."""
    measured = [row for row in rows if "builds" in row]
    count = collections.Counter(build for row in measured for build in row["builds"])
    if len(count) == 1:
        return f"All rows are of {next(iter(count))}.\n"
    if not count:
        return ""
    mixed = sum(len(set(row["builds"])) > 1 for row in measured)
    each = "; ".join(f"{n} of {build}" for build, n in count.items())
    return f"**Measurements of several builds**, pooled within {mixed} of the cases: {each}.\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f
    ):
        for line in f:
            yield json.loads(line)


def _complete(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    run: dict[str, Any] = {"threads": None}
    for row in rows:
        run |= {key: row[key] for key in ("threads", "commit", "dirty", "native") if key in row}
        yield run | row


def median(row: dict[str, Any], name: str) -> float | None:
    """Seconds of one product (or whatever the topic counts) by a contender; None where it was not measured."""
    seconds = row["seconds"].get(name)
    return quartiles(seconds)[1] / row.get("per call", {}).get(name, 1) if seconds else None
