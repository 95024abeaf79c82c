"""Everything the library raises on purpose."""

from __future__ import annotations


class UPGError(Exception):
    """Base of every error that `upg_jax` raises on purpose."""


class FormatError(UPGError, ValueError):
    """A file or a layer breaks a rule of the MdCSR format; the message names where and which."""


class EncodingError(UPGError, ValueError):
    """A dense matrix cannot be encoded as asked (NaN, infinity, a row too large, a bad density)."""


class CheckpointError(UPGError, ValueError):
    """A source checkpoint or a model description is missing something or is of an unknown kind."""


class BackendError(UPGError, RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


class MissingDependencyError(UPGError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""
