"""Raw rows: one JSON object a line, each with a `topic`; the first says when, where and with what it was measured."""

from __future__ import annotations

import datetime
import gzip
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upg_jax.cli._doctor import collect
from upg_jax.cli._measure import quartiles, usable_threads

ROOT = Path(__file__).parents[1]
PEERS = ("scipy", "sparse_dot_mkl", "mkl", "torch", "llama-cpp-python")
_FLAGS = ("avx", "fma", "f16c", "amx", "asimd", "sve", "gfni")


def environment(**more: Any) -> dict[str, Any]:
    """Date, commit, versions, processor with its flags and caches, threads and load."""
    return {
        "topic": "environment",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        **collect(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "flags": sorted(flag for flag in _cpu_flags() if flag.startswith(_FLAGS)),
        "caches": _caches(),
        "threads": usable_threads(),
        "load": os.getloadavg(),
        **more,
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
    """Appends rows to a file, each as soon as it is measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        print(json.dumps(_rounded(row)), file=self._file, flush=True)


def _rounded(value: Any) -> Any:
    """Times to a tenth of a microsecond: what a clock tells, and half the file."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 7) if isinstance(value, float) and abs(value) < 1e3 else value


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of some files, plain or gzipped; each gets what its file's last environment row says of `threads`.

    A case that was measured several times is one row with all calls: a busy minute of the machine is not the result.
    """
    return list(_pooled(row for path in paths for row in _with_threads(_lines(path))))


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
            known[key] = row | {"seconds": {name: list(calls) for name, calls in row["seconds"].items()}}
            continue
        for name, calls in row["seconds"].items():
            known[key]["seconds"].setdefault(name, []).extend(calls)
    yield from others
    yield from known.values()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f
    ):
        for line in f:
            yield json.loads(line)


def _with_threads(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    threads = None
    for row in rows:
        threads = row.get("threads", threads)
        yield {"threads": threads, **row}


def median(row: dict[str, Any], name: str) -> float | None:
    """Seconds of one product (or whatever the topic counts) by a contender; None where it was not measured."""
    seconds = row["seconds"].get(name)
    return quartiles(seconds)[1] / row.get("per call", {}).get(name, 1) if seconds else None
