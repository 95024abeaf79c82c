"""The report, line by line."""

from __future__ import annotations

import importlib.metadata
import mmap
import platform
import sys
from collections.abc import Iterator

import metal_ops
from upg_jax._metal_report import _fast, _right
from upg_jax._metal_report._line import Line

_PACKAGES = ("jax", "jaxlib", "numpy", "pyobjc-core", "pyobjc-framework-Metal")


def report() -> Iterator[Line]:
    """Yields the lines of the report as they come."""
    emulated = sys.platform != "darwin"
    yield from _about(emulated)
    try:
        device = metal_ops.open_emulated_device() if emulated else metal_ops.open_apple_device()
    except Exception as error:
        yield Line("device", "opening", False, f"{type(error).__name__}: {error}")
        return
    limits = device.limits
    yield Line("device", "name", True, device.name)
    yield Line("device", "threadgroup memory", True, f"{limits.threadgroup_memory:,} bytes")
    yield Line("device", "largest buffer", True, f"{device.max_buffer:,} bytes")
    compiled = set()
    for line in _right.compiling(device):
        compiled |= {line.name} if line.ok else set()
        yield line
    yield from _right.checking(device, compiled)
    yield from _fast.memory(device)
    yield from _right.inside_jit("emulator" if emulated else "metal")
    yield from _fast.timing(device, compiled, emulated)


def _about(emulated: bool) -> Iterator[Line]:
    from upg_jax._version import __version__

    where = "the emulator (no Mac): times mean nothing" if emulated else "Metal"
    yield Line("machine", "runs on", True, where)
    yield Line("machine", "system", True, f"{platform.platform()}, macOS {platform.mac_ver()[0] or 'none'}")
    yield Line("machine", "page size", True, f"{mmap.PAGESIZE:,} bytes")
    yield Line("machine", "python", True, platform.python_version())
    yield Line("machine", "upg_jax", True, __version__)
    for name in _PACKAGES:
        try:
            yield Line("machine", name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Line("machine", name, emulated or not name.startswith("pyobjc"), "not installed")
