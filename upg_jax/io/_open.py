"""Opening files that may be anything: never blocks, and names what was found instead of a model file."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from upg_jax._errors import FormatError

_PICKLE = (
    "a Python pickle; if it is a UPG version 1 file, convert it first (`upg-jax convert`, "
    "`upg_jax.io.convert_v1`)"
)
_KNOWN_STARTS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the file it stands for; fetch it with `git lfs pull`",
    ),
    (
        rb"PK[\x03\x05\x07]",
        "a zip archive (PyTorch checkpoints are zips); save the weights as safetensors first",
    ),
    (
        rb"\s*(<!doctype html|<html|<\?xml)",
        "an HTML or XML page, most likely a failed download; fetch it again",
    ),
    (rb"GGUF", "a GGUF file; `upg-jax compress` reads it as a source checkpoint"),
    (rb"\x1f\x8b", "a gzip archive; unpack it first"),
    (rb"\x89HDF", "an HDF5 file; save the weights as safetensors first"),
    (rb"\x80[\x02-\x05]|\(dp?\d|\}q[\x00-\x09]", _PICKLE),
)


def looks_like(start: bytes) -> str | None:
    """Returns what a file beginning with these bytes is, with what to do about it; None if unknown."""
    for pattern, description in _KNOWN_STARTS:
        if re.match(pattern, start, re.IGNORECASE):
            return description
    return None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading, without ever waiting for a pipe's other end.

    Raises:
        FileNotFoundError: if there is none.
        FormatError: if the path is a directory, a pipe, a socket or a device.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    _check_regular(os.stat(path).st_mode, path)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        # The name may point elsewhere by now; what was opened counts.
        _check_regular(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    kind = next((name for test, name in kinds.items() if test(mode)), "something else")
    raise FormatError(f"{Path(path)}: must be a regular file; it is {kind}")
