"""Kills compressions with SIGKILL at chosen file system operations, then lets them finish.

Usage: killed_runs.py SOURCE DIRECTORY FORCE POINTS, with POINTS a JSON list of operation numbers, or "all".
Prints one JSON object: how many operations an undisturbed run makes, and for every point what was left and
what the next run made of it. Children are forked, so that one import serves them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from upg_jax.compress import Settings, compress_checkpoint

# Audit events are raised before the operation, so that each kill falls between two operations.
_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")
OLD, NEW = Settings(density=0.25), Settings(density=0.5)


def digest(directory: Path) -> str | None:
    if not directory.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        found.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    return found.hexdigest()


def count_operations(at: int | None, below: Path) -> list[int]:
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in _EVENTS and str(arguments[0]).startswith(str(below)):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def forked(action) -> int:
    """Runs `action` in a child and returns its exit status: what `action` returns, or minus the signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        status = action()
    except BaseException:
        traceback.print_exc()
        status = 255
    os._exit(status)


def main() -> None:
    source, directory, force, points = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3] == "force",
        sys.argv[4],
    )
    destination = directory / "out"

    def run(settings: Settings = NEW, at: int | None = None) -> None:
        seen = count_operations(at, directory)
        compress_checkpoint(source, destination, settings, force=force)
        (directory / "operations").write_text(str(seen[0]))

    def fresh() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        if force:
            assert forked(lambda: run(OLD) or 0) == 0

    fresh()
    old = digest(destination)
    assert forked(lambda: run() or 0) == 0
    operations, expected = int((directory / "operations").read_text()), digest(destination)
    chosen = range(1, operations + 1) if points == "all" else json.loads(points)
    results = []
    for point in chosen:
        # A negative number counts from the end.
        at = point if point > 0 else operations + 1 + point
        fresh()
        killed = forked(lambda at=at: run(at=at) or 0)
        left = {old: "old", None: "nothing", expected: "new"}.get(digest(destination), "half")
        finished = forked(lambda: run() or 0)
        after = {None: "nothing", expected: "new"}.get(digest(destination), "wrong")
        traces = sorted(p.name for p in directory.iterdir() if p.name not in ("out", "operations"))
        results.append(
            {"at": at, "killed": killed, "left": left, "finished": finished, "after": after, "traces": traces}
        )
    print(json.dumps({"operations": operations, "results": results}))


if __name__ == "__main__":
    main()
