"""Replacing files whole: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file beside `path` that takes its place when the block ends well.

    On success the file's bytes and then its name are forced to disk; on any exception, an interrupt included,
    the temporary file is removed and `path` is as before. Maps of the old file stay valid.

    Raises:
        FileNotFoundError: if the directory does not exist.
        OSError: if `path` exists and is not a regular file, or for anything the disk reports.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"write: {path} exists and is not a regular file; choose another name")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # Not tempfile: its 0600 would override the user's umask.
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        error.filename = str(path)  # the name that the caller knows
        raise
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say whose
        raise
    if os.name == "posix":
        _sync(path.parent)


@contextlib.contextmanager
def temporary_directory(prefix: str, parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Yields a new directory that is removed in the end, also by a Ctrl-C in the midst of making or removing it.

    `tempfile.TemporaryDirectory` leaves it, or half of it, then.

    Args:
        prefix: of its name.
        parent: where it is made; the system's directory for temporary files if None.
    """
    directory = Path(tempfile.gettempdir() if parent is None else parent, prefix + secrets.token_hex(8))
    try:
        directory.mkdir(mode=0o700)
        yield directory
        shutil.rmtree(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    # Windows flushes only handles that may write; POSIX opens directories only for reading.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
