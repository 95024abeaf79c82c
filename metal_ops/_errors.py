"""Everything that metal_ops raises on purpose."""

from __future__ import annotations


class MetalError(Exception):
    """Base of every error that `metal_ops` raises on purpose."""


class SourceError(MetalError, ValueError):
    """A Metal source breaks a rule; the message names file, line and rule."""


class KernelError(MetalError, RuntimeError):
    """A kernel broke a rule while it ran, or was dispatched wrongly; the message names kernel and rule."""


class UnavailableError(MetalError, RuntimeError):
    """Something outside Python is missing (a compiler, a library, a device); the message names it."""
