"""Ctrl-C that is neither lost nor taken for a failure, wherever the main thread is."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from types import CodeType, FrameType
from typing import Any

_AGAIN_SECONDS = 0.02
_IMPATIENCE_SECONDS = 2.0
# When one was raised that has not been dealt with.
_raised = float("-inf")


@contextlib.contextmanager
def interruptible(number: int = signal.SIGINT) -> Iterator[None]:
    """Raises `KeyboardInterrupt` for a signal where it arrives; afterwards another one ends the process silently.

    Python's own handler raises in whatever runs. The initialization of a C extension takes that for a failure, or for
    a reason to abort; callbacks of the garbage collector, of which jax has one, and destructors print and drop it. In
    these places it is raised a moment later. A second one that comes at once is taken for the first: it would end the
    saving of what was done. Who goes on after one calls `handled`.

    Args:
        number: SIGINT or SIGTERM. One that the process does not handle in the usual way is left alone.
    """
    global _raised
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not usual:
        yield
        return
    _raised = float("-inf")
    over = False
    later: list[threading.Timer] = []
    unraisable = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _raised
        if over:
            return
        if _is_lost_in(frame, hook.__code__):
            soon()
        elif time.monotonic() - _raised > _IMPATIENCE_SECONDS:
            _raised = time.monotonic()
            raise KeyboardInterrupt

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            handled()
            soon()
        else:
            unraisable(dropped)

    def soon() -> None:
        later.append(timer := threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main, (number,)))
        timer.daemon = True
        timer.start()

    signal.signal(number, interrupt)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        # Whoever handles signals afterwards must not get one of this command's.
        over = True
        for timer in later:
            timer.cancel()
            timer.join()
        signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = unraisable


def handled() -> None:
    """Lets the next interrupt count, however soon it comes: what the last one ended has been put away."""
    global _raised
    _raised = float("-inf")


def _is_lost_in(frame: FrameType | None, hook: CodeType) -> bool:
    """Whether an exception would be dropped: in the hook, or where a C extension is being initialized.

    Only the import system has such a module's loader as `self`.
    """
    while frame is not None:
        if frame.f_code is hook or isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
