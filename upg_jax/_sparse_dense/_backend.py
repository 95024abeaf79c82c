"""Which implementation `sparse_dense` lowers to, and why."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from upg_jax import _cuda, _native
from upg_jax._compat import TraceContext
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _metal_lowering

Backend: TypeAlias = Literal["auto", "reference", "native", "metal", "emulator", "cuda"]

ENVIRONMENT_VARIABLE = "UPG_JAX_BACKEND"


def _always() -> str | None:
    return None


# name -> a function that returns why it cannot be used here, or None
BACKENDS: dict[str, Callable[[], str | None]] = {
    "reference": _always,
    "native": _native.unavailable_reason,
    "metal": functools.partial(_metal_lowering.unavailable_reason, "metal"),
    "emulator": functools.partial(_metal_lowering.unavailable_reason, "emulator"),
    "cuda": _cuda.no_gpu_reason,
}

_requested = TraceContext("")


def unavailable_reason(backend: str) -> str | None:
    """Says why `backend` cannot be used in this process; None where it can.

    Raises:
        BackendError: if there is no backend of that name.
    """
    if backend in BACKENDS:
        return BACKENDS[backend]()
    known = ", ".join(["auto", *BACKENDS])
    raise BackendError(f"backend: must be one of {known}; got {backend!r}")


def requested_backend() -> str:
    """The backend asked for by `use_backend` or the environment; read while tracing.

    Raises:
        BackendError: if it does not exist or cannot be used here, with the reason.
    """
    backend = _requested.value or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend != "auto" and (reason := unavailable_reason(backend)):
        raise BackendError(f"backend {backend!r} cannot be used here: {reason}; use 'auto' or 'reference'")
    return backend


def choose_backend(platform: str) -> tuple[str, str]:
    """Returns the backend that the current choice gives on a JAX platform, and the reason."""
    backend = requested_backend()
    if backend != "auto":
        origin = "use_backend" if _requested.value else f"the environment variable {ENVIRONMENT_VARIABLE}"
        return backend, f"forced by {origin}"
    if platform in ("cuda", "gpu"):
        if found := _cuda.unavailable_reason():
            return "reference", f"{found}: pure JAX runs everywhere"
        return "cuda", "NVRTC compiles the kernels when a GPU first needs them"
    if platform != "cpu":
        return "reference", f"no kernels for platform {platform!r} in this version: pure JAX runs everywhere"
    on_gpu = ""
    if _metal_lowering.is_apple_silicon():
        if found := _metal_lowering.unavailable_reason("metal"):
            on_gpu = f"; no Metal kernels: {found}"
        else:
            return "metal", (
                f"{_metal_lowering.device_name()} takes products of at least {_metal_lowering.MIN_WORK:,} entries "
                f"times vectors; {'the compiled kernels' if _native.load() else 'pure JAX'} the others"
            )
    library = _native.load()
    if library is None:
        return "reference", f"{_native.unavailable_reason()}: pure JAX runs everywhere{on_gpu}"
    return "native", f"the compiled kernels are loaded; this processor runs {library.kernels}{on_gpu}"


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces the implementation of `sparse_dense` inside a `with` block, for the calling thread.

    The choice is part of jit's cache key: a jitted function that was traced under another choice is traced
    again. It takes precedence over the environment variable `UPG_JAX_BACKEND`, which is read when tracing.

    Args:
        backend: `"auto"`, `"reference"`, or a kernel backend that `upg-jax doctor` lists as usable.

    Raises:
        BackendError: if there is no such backend or it cannot be used here, saying why.
    """
    if backend != "auto" and (reason := unavailable_reason(backend)):
        raise BackendError(f"backend {backend!r} cannot be used here: {reason}; use 'auto' or 'reference'")
    with _requested(backend):
        yield
