"""A device whose Metal is the stand-in."""

from __future__ import annotations

from typing import Any

from metal_ops._apple import Device
from metal_ops._buffers import COPY_BYTES
from metal_ops._emulator import Emulator
from metal_ops._source import Source
from metal_ops._standin._metal import StandIn


def open_emulated_device(*, copy_bytes: int = COPY_BYTES, **behaviour: Any) -> Device:
    """Opens a device that runs kernels in the emulator, behind everything that a Mac's would pass through.

    Args:
        copy_bytes: up to which size memory is copied and not wrapped.
        **behaviour: of `StandIn`, to be another Mac.

    Raises:
        UnavailableError: if there is no C++ compiler.
    """
    metal = StandIn(_compile, **behaviour)
    return Device(metal, metal.autorelease_pool, copy_bytes=copy_bytes)


def _compile(text: str) -> Any:
    origins = tuple(("library", line + 1) for line in range(text.count("\n") + 1))
    return Emulator().compile(Source("library", text, origins, {}))
