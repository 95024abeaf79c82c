"""Compiles C++ once per content: a cache of the user's, filled atomically."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from metal_ops._errors import SourceError, UnavailableError

INCLUDE = Path(__file__).parent / "include"


def cache_directory() -> Path:
    """Where compiled programs are kept: `METAL_OPS_CACHE`, or a folder of the user's cache."""
    chosen = os.environ.get("METAL_OPS_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "metal_ops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metal_ops"


@functools.cache
def compiler() -> str:
    """Path of the C++ compiler: `CXX`, or the first of c++, g++ and clang++ on the path.

    Raises:
        UnavailableError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise UnavailableError(
        f"the emulator needs a C++17 compiler; found no {wanted or 'c++, g++ or clang++'} on the path: install one "
        "(Debian: apt install g++; macOS: xcode-select --install) or name it in CXX"
    )


@functools.cache
def _headers(target: str) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted((INCLUDE / target).iterdir()))


@functools.cache
def identity(path: str) -> str:
    """The compiler and its version, so that a new one compiles anew."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def build(code: str, options: Sequence[str], *, name: str, suffix: str) -> Path:
    """Compiles the emulator's C++; returns the path of the result, which may be from an earlier process.

    Raises:
        UnavailableError: no compiler was found, or the cache cannot be written.
        SourceError: the compiler refuses the code; the message holds what it said.
    """
    path = compiler()
    options = ["-std=c++17", "-g1", *options]
    # The headers by what they say, not by where this package is installed.
    digest = hashlib.sha256()
    for part in (code.encode(), _headers("emulator"), "\0".join(options).encode(), identity(path).encode()):
        digest.update(hashlib.sha256(part).digest())
    target = cache_directory() / f"{name}-{digest.hexdigest()[:24]}{suffix}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as e:
        raise UnavailableError(
            f"the emulator keeps what it compiles in {target.parent}, which cannot be written ({e.strerror}); name "
            "another folder in METAL_OPS_CACHE"
        ) from e
    with temporary as folder:
        source, result = Path(folder, f"{name}.cc"), Path(folder, f"{name}{suffix}")
        source.write_text(code, encoding="utf-8")
        command = [path, *options, f"-I{INCLUDE / 'emulator'}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SourceError(f"{name}: does not compile for the emulator:\n{done.stderr.strip()[:4000]}")
        os.replace(result, target)
    return target
