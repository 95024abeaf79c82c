"""XLA custom calls implemented in Python: a handler that may run inside any jitted program on the CPU.

XLA calls a C function pointer; `ctypes` makes one out of a Python function. That is fast enough beside a GPU's launch
(some microseconds), needs no compiler, and works in loops and from several of XLA's threads. Three things must never
happen: XLA asking for the handler's API version and getting no answer (every later use of JAX fails), an exception
leaving the function (`ctypes` would report success, with results unwritten), and Ctrl-C doing the same: Python looks
for signals when it enters a function, before any `try`.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from metal_ops._ffi_types import (
    CANCELLED,
    EXECUTE,
    INTERNAL,
    Call,
    ErrorArguments,
    answer_metadata,
    create_error,
    read_call,
    read_frame,
)

_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
# XLA keeps the function pointers for as long as the process lives.
_registered: dict[str, Any] = {}
# XLA's function that makes an error; known since the first frame.
_create_error: Any = None
# When Ctrl-C came while the main thread was inside a handler; 0 if it did not.
_interrupted = 0.0
# An interrupt that came too late for one call stops the next one of the same program, not one an hour later.
_INTERRUPT_SECONDS = 1.0


def register_call(target: str, function: Callable[[Call], None]) -> None:
    """Makes a Python function the implementation of a custom call on JAX's platform `cpu`.

    Registering a name again changes nothing: programs that were compiled keep what they have. Where the process
    handles Ctrl-C in Python's default way, it is deferred while the main thread is inside the function, and then
    fails the program that made the call.

    One gap cannot be closed in Python: where the caller stands within a few frames of the recursion limit, the
    exception comes before the function's first line. Programs should fill results with NaN before the call.

    Args:
        target: name of the call, with a version: compiled programs outlive the process in JAX's cache.
        function: called with the operands and results, from any thread. What it raises becomes an error of the
            program. It must write every result.
    """
    import jax

    _guard_interrupts()
    if target in _registered:
        return
    handler = make_handler(function)
    _registered[target] = handler
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def make_handler(function: Callable[[Call], None]) -> Any:
    """Returns a C function pointer that XLA can call; it must be kept alive."""

    def enter(address: int) -> int | None:
        global _interrupted, _create_error
        try:
            extension, api, stage, fields = read_frame(address)
            if api and _create_error is None:
                _create_error = create_error(api)
            if (extension and answer_metadata(extension)) or stage != EXECUTE:
                return None
            _guard_interrupts()
            function(read_call(fields))
            if _interrupted and threading.current_thread() is threading.main_thread():
                recent = time.monotonic() - _interrupted < _INTERRUPT_SECONDS
                _interrupted = 0.0
                if recent:
                    raise KeyboardInterrupt
            return None
        except BaseException as error:
            # No Python function may be called from here: where the recursion limit was the error, that would
            # raise it again, outside of any `try`.
            try:
                message = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
            except BaseException:
                message = b"an exception without a message"
            if _create_error is None:
                raise
            code = CANCELLED if type(error) is KeyboardInterrupt else INTERNAL
            return _create_error(ErrorArguments(ctypes.sizeof(ErrorArguments), None, message, code))

    _codes.add(enter.__code__)
    return _HANDLER(enter)


# The code of `enter`, the same for every handler; told from others by identity.
_codes: set[Any] = set()


def _guard(number: int, frame: FrameType | None) -> None:
    """Replaces Python's default handler of SIGINT: raises, unless a handler of ours is on the stack."""
    global _interrupted
    at = frame
    while at is not None:
        if at.f_code in _codes:
            _interrupted = time.monotonic()
            return
        at = at.f_back
    signal.default_int_handler(number, frame)


def _guard_interrupts() -> None:
    """Installs the guard where that is possible and nobody else has installed something."""
    if threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _guard)
