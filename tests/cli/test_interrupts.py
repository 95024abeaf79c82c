"""Ctrl-C arrives once, wherever the main thread is when it is pressed."""

from __future__ import annotations

import gc
import importlib.util
import signal
import sys
import threading
import time
from importlib.machinery import ExtensionFileLoader, ModuleSpec

import pytest

pytest.importorskip("typer", reason='pip install "upg-jax[demo]"')
from upg_jax.cli import _interrupts
from upg_jax.cli._interrupts import handled, interruptible

pytestmark = pytest.mark.usefixtures("usual_interrupts")


def ctrl_c(*ignored):
    signal.raise_signal(signal.SIGINT)


def wait():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.001)


def test_not_in_the_initialization_of_an_extension_but_right_after():
    class Extension(ExtensionFileLoader):
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            ctrl_c()
            module.whole = True

    module = importlib.util.module_from_spec(
        ModuleSpec("extension", loader := Extension("extension", "none"))
    )

    def load():
        loader.exec_module(module)
        wait()

    with interruptible(), pytest.raises(KeyboardInterrupt):
        load()
    assert module.whole


def test_a_callback_of_the_garbage_collector_does_not_swallow_it(capfd):
    def ctrl_c_once(*ignored):
        gc.callbacks.remove(ctrl_c_once)
        ctrl_c()

    def collect():
        gc.callbacks.append(ctrl_c_once)
        gc.collect()
        wait()

    with interruptible(), pytest.raises(KeyboardInterrupt):
        collect()
    assert capfd.readouterr().err == ""


def test_one_that_comes_again_while_it_is_put_off_is_not_lost(monkeypatch, capfd):
    class Stalled(threading.Timer):
        """Whose time is over before `start` returns."""

        def start(self):
            super().start()
            threads.append(self)
            if len(threads) == 1:
                self.join()

    class Dropped:
        def __del__(self):
            ctrl_c()

    def drop():
        Dropped()
        wait()

    threads = []
    monkeypatch.setattr(threading, "Timer", Stalled)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        drop()
    assert len(threads) == 2
    assert capfd.readouterr().err == ""


def test_one_that_was_put_off_does_not_reach_what_comes_afterwards(monkeypatch):
    class Dropped:
        def __del__(self):
            ctrl_c()

    monkeypatch.setattr(_interrupts, "_AGAIN_SECONDS", 60)
    with interruptible():
        Dropped()
        assert timers()
    assert not timers()


def timers():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_second_one_at_once_does_not_end_what_the_first_began(monkeypatch):
    now = [100.0]
    with interruptible():
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        now[0] += 1
        ctrl_c()
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_second_one_counts_at_once_where_the_first_was_handled(monkeypatch):
    with interruptible():
        monkeypatch.setattr(time, "monotonic", lambda: 100.0)
        for _ in range(2):
            handled()
            with pytest.raises(KeyboardInterrupt):
                ctrl_c()


def test_a_request_to_end_is_put_off_as_ctrl_c_is_and_later_ends_the_process_again():
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def drop():
        Dropped()
        wait()

    # As where a shell ignores Ctrl-C for what it starts in the background.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        drop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_exceptions_that_nobody_can_catch_are_shown_as_usual(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    class Broken:
        def __del__(self):
            raise ValueError("mine")

    with interruptible():
        Broken()
        gc.collect()
    assert [str(one.exc_value) for one in shown] == ["mine"]
    Broken()
    gc.collect()
    assert len(shown) == 2
    assert sys.unraisablehook == shown.append


def test_commands_run_in_threads_which_get_no_signals():
    ran = []

    def command():
        with interruptible():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert ran == [signal.default_int_handler]


def test_afterwards_it_ends_the_process_and_who_ignored_it_still_does():
    with interruptible():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
