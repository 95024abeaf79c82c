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
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 0.02
_IMPATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises `KeyboardInterrupt` for SIGINT where it arrives; afterwards another one ends the process silently.

    Python's own handler raises in whatever runs. The initialization of a C extension takes that for a failure, or for
    a reason to abort; callbacks of the garbage collector, of which jax has one, and destructors print and drop it. In
    these places it is raised a moment later. A second one that comes at once is taken for the first: it would end the
    saving of what was done.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    raised = float("-inf")
    over = False
    later: list[threading.Timer] = []
    unraisable = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if over:
            return
        if _in_an_extension(frame):
            soon()
        elif time.monotonic() - raised > _IMPATIENCE_SECONDS:
            raised = time.monotonic()
            raise KeyboardInterrupt

    def hook(dropped: Any) -> None:
        nonlocal raised
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            raised = float("-inf")
            soon()
        else:
            unraisable(dropped)

    def soon() -> None:
        later.append(timer := threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        # Whoever handles signals afterwards must not get one of this command's.
        over = True
        for timer in later:
            timer.cancel()
            timer.join()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.unraisablehook = unraisable


def _in_an_extension(frame: FrameType | None) -> bool:
    """Whether a C extension is being initialized: only the import system has its loader as `self`."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
