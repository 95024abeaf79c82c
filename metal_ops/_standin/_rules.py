"""Objects that answer only to methods which PyObjC publishes, called with arguments of the published types."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from metal_ops._standin._selectors import METHODS


class MetalRuleError(Exception):
    """A call that Metal, or PyObjC in front of it, would refuse or leave undefined."""


def require(condition: bool, rule: str) -> None:
    """Raises `MetalRuleError` unless the condition holds."""
    if not condition:
        raise MetalRuleError(rule)


class MTLSize(NamedTuple):
    """Three dimensions."""

    width: int
    height: int
    depth: int

    @property
    def total(self) -> int:
        """Their product."""
        return self.width * self.height * self.depth


def size_make(width: int, height: int, depth: int) -> MTLSize:
    """`MTLSizeMake`."""
    for value in (width, height, depth):
        _check("MTLSizeMake", "Q", value)
    return MTLSize(width, height, depth)


class MetalObject:
    """Base of the stand-in's objects.

    A subclass implements a method under PyObjC's spelling of it. Every call from outside is checked against the
    table; attributes that begin with an underscore are the stand-in's own.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        selector = name.replace("_", ":")
        if selector not in METHODS:
            raise AttributeError(f"{type(self).__name__}: PyObjC publishes no method {selector!r}")
        try:
            method = object.__getattribute__(self, name)
        except AttributeError:
            raise AttributeError(f"{type(self).__name__} has no method {selector!r}") from None

        def call(*arguments: Any) -> Any:
            kinds = METHODS[selector][1:]
            require(
                len(arguments) == len(kinds),
                f"{selector} takes {len(kinds)} arguments; got {len(arguments)}",
            )
            for kind, argument in zip(kinds, arguments, strict=True):
                _check(selector, kind, argument)
            result = method(*arguments)
            if any(kind.startswith("o") for kind in kinds):
                require(
                    isinstance(result, tuple) and len(result) == 2, f"{selector} gives a result and an error"
                )
            return result

        return call


def _check(where: str, kind: str, value: Any) -> None:
    if kind in ("Q", "q"):
        bits = 64 if kind == "Q" else 63
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**bits
        require(fits, f"{where}: must be an unsigned integer; got {value!r}")
    elif kind == "Z":
        require(isinstance(value, bool), f"{where}: must be a bool; got {value!r}")
    elif kind == "{MTLSize=QQQ}":
        require(isinstance(value, MTLSize), f"{where}: must be a MTLSize; got {value!r}")
    elif kind == "^v":
        require(_is_contiguous(value), f"{where}: must be an object with memory; got {value!r}")
    elif kind.startswith("o"):
        require(value is None, f"{where}: PyObjC wants None where an error comes back; got {value!r}")


def _is_contiguous(value: Any) -> bool:
    try:
        return memoryview(value).c_contiguous
    except TypeError:
        return False


def address_of(value: Any) -> int:
    """Where a writable object's memory begins."""
    view = memoryview(value)
    require(not view.readonly, "newBufferWithBytesNoCopy: the memory must be writable")
    return ctypes.addressof(ctypes.c_char.from_buffer(view.cast("B")))
