"""Which memory of this process is a mapped file: a GPU that shares memory wraps each file once, as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

_files: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
_registered = 0


def register(owner: Any, address: int, nbytes: int) -> None:
    """Notes a map; it is forgotten with its owner, the `mmap` object."""
    global _registered
    _files[owner] = address, nbytes
    _registered += 1


def count() -> int:
    """How many maps there have been; changes whenever one is added."""
    return _registered


def files() -> Iterator[tuple[Any, int, int]]:
    """Owner, address and size of each map."""
    for owner, (address, nbytes) in list(_files.items()):
        yield owner, address, nbytes
