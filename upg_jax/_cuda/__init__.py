"""Launching kernels on NVIDIA GPUs inside compiled programs: loading the handler, and compiling what it asks for.

The library has one XLA handler, which knows nothing of products: a call's attributes say what to launch. docs/nvidia.md
describes it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

from upg_jax import _native

LAUNCH = "upg_jax.cuda_launch.v1"


class Library:
    """The loaded library; see `src/launch.cc`."""

    def __init__(self, path: Path) -> None:
        c = ctypes.CDLL(str(path))
        self._provide = c.upg_cuda_provide
        self._provide.argtypes = (
            ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p,
            ctypes.c_int,
        )  # fmt: skip
        self._provide.restype = None
        self.ffi_api: tuple[int, int] = (c.upg_ffi_api_major(), c.upg_ffi_api_minor())
        c.upg_cuda_handler.restype = ctypes.c_void_p
        self.handler: int = c.upg_cuda_handler()
        # Kept alive with the library, which calls it the first time that a device needs a kernel.
        self._compile = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)(self._on_demand)
        c.upg_cuda_set_compiler(self._compile)

    def _on_demand(self, kernel: bytes, major: int, minor: int) -> None:
        """Compiles a kernel, or says why not. Ctrl-C meanwhile fails the call, with the text `KeyboardInterrupt: `."""
        cubin, problem, for_good = b"", b"", True
        try:  # nothing may leave a callback
            import metal_ops

            try:
                cubin = metal_ops.compile_named(kernel.decode(), f"sm_{major}{minor}")
            except (metal_ops.SourceError, metal_ops.UnavailableError) as error:
                problem = _described(error)
        except BaseException as error:  # such as a lack of memory: it ends this call alone
            problem, for_good = _described(error), False
        self._provide(kernel, major, minor, cubin, len(cubin), problem, for_good)


def _described(error: BaseException) -> bytes:
    return f"{type(error).__name__}: {error}".encode()


def load() -> Library | None:
    """The library with its handler registered, or None; `unavailable_reason` then says why.

    Programs that were lowered elsewhere need this, too, so it happens when `sparse_dense` is imported.
    """
    found = _load()
    return found if isinstance(found, Library) else None


@functools.cache
def unavailable_reason() -> str | None:
    """Says why programs for NVIDIA GPUs cannot be made in this process; None where they can. Needs no GPU."""
    found = _load()
    if isinstance(found, str):
        return found
    import metal_ops

    try:
        metal_ops.nvrtc_version()
    except metal_ops.UnavailableError as error:
        return str(error)
    return None


def no_gpu_reason() -> str | None:
    """Says why kernels cannot run on a GPU of this process; None where they can."""
    if reason := unavailable_reason():
        return reason
    return None if _devices() else "JAX sees no NVIDIA GPU here"


def _devices() -> list[Any]:
    import jax

    try:
        return list(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return []


@functools.cache
def _load() -> Library | str:
    import jax

    path = next((p for folder in __path__ if (p := Path(folder) / "libupg_cuda.so").exists()), None)
    if path is None:
        return "it was installed without the launcher of kernels (no C++17 compiler when it was installed?)"
    if reason := _native.too_old_reason():
        return reason
    try:
        library = Library(path)
    except OSError as error:
        return f"the launcher of kernels does not load: {error}"
    # As for the CPU's handlers: one that was built for a newer header would register, and then break JAX.
    built, running = library.ffi_api, _native.running_ffi_api()
    if running is None or built[0] != running[0] or built[1] > running[1]:
        jaxlib = importlib.metadata.version("jaxlib")
        reason = f"the launcher of kernels was built for another XLA than that of jaxlib {jaxlib}; reinstall upg_jax"
        warnings.warn(f"upg_jax: {reason}; sparse_dense falls back to pure JAX on NVIDIA GPUs", stacklevel=2)
        return reason
    jax.ffi.register_ffi_target(LAUNCH, jax.ffi.pycapsule(ctypes.c_void_p(library.handler)), platform="CUDA")
    return library


def shared_memory() -> int:
    """Bytes of shared memory that a block may have on every GPU here; without one, what most GPUs have."""
    return min((_of_device(device) for device in _devices()), default=_COMMON_SHARED_MEMORY)


_COMMON_SHARED_MEMORY = 99 << 10
# Bytes by compute capability, from CUDA's programming guide.
_SHARED_MEMORY = {"7.0": 96, "7.5": 64, "8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}


def _of_device(device: object) -> int:
    """From jax where it says so."""
    found = getattr(device, "shared_memory_per_block_optin", None)
    if isinstance(found, int):
        return found
    return _SHARED_MEMORY.get(str(getattr(device, "compute_capability", "")), 99) << 10
