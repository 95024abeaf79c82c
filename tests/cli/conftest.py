"""The command line run as a user runs it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def usual_interrupts():
    """Python's handler of Ctrl-C, as a process begins with, and again afterwards: a command leaves another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def upg_jax(tmp_path, monkeypatch, usual_interrupts):
    """Runs `upg-jax ARGUMENTS` without a terminal, as its entry point does, but in this process.

    So it starts no Python and compiles nothing twice.
    """
    pytest.importorskip("typer", reason='pip install "upg-jax[demo]"')
    from upg_jax.cli import _output
    from upg_jax.cli import run as command_line

    def run(*arguments, said="", **environment):
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(_output.stdout, "width", 200)  # made when it was imported, perhaps for a terminal
            patch.setattr(sys, "stdin", io.StringIO(said))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "argv", ["upg-jax", *map(str, arguments)])
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                command_line()
        shown = (stream.buffer.getvalue().decode() for stream in (out, err))
        return subprocess.CompletedProcess(arguments, end.value.code, *shown)

    return run


@pytest.fixture
def upg_jax_alone(tmp_path):
    """Runs `upg-jax ARGUMENTS` without a terminal, in a process of its own."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "upg_jax.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment},
            timeout=240,
            check=False,
        )

    return run
