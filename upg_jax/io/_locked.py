"""One process at a time in the directory of an unfinished result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from upg_jax._errors import CheckpointError


@contextlib.contextmanager
def locked(path: Path, operation: str) -> Iterator[None]:
    """Keeps other runs out of a directory, which it makes if need be, until the block or the process ends.

    A run that fails leaves no empty directory. Windows, and file systems that know no locks, go without.

    Args:
        path: the directory.
        operation: the command, for the error.

    Raises:
        CheckpointError: if another run is at work, or something else is in the directory's place.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    busy = CheckpointError(
        f"{operation}: another run is at work in {path}; wait for it, or choose another name"
    )
    try:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except FileExistsError:
        raise CheckpointError(
            f"{operation}: {path} must be a directory for unfinished work, or not exist; got a file or a dangling "
            "link; move it away or choose another name"
        ) from None
    except FileNotFoundError:
        # Gone since it was made: a run that ends takes the directory with it. Without a parent it never was.
        if path.parent.is_dir():
            raise busy from None
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass
        # A run that ends takes the directory with it.
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise busy
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                path.rmdir()  # where nothing was begun
            raise
    finally:
        os.close(descriptor)
