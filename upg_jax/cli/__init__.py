"""The `upg-jax` command. Nothing here imports jax until a command needs it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

# What the system's own words leave open.
_ADVICE = {
    errno.ENOSPC: "make room there and run the same command again",
    errno.EDQUOT: "make room there and run the same command again",
    errno.EACCES: "look at its owner and mode and at those of its folder (ls -ld), or name another place",
    errno.EPERM: "look at its owner and mode and at those of its folder (ls -ld), or name another place",
    errno.EROFS: "name another place",
}


def main() -> None:
    """Runs the command line; exits with 0, 1 (failed), 2 (wrong usage) or 130 (Ctrl-C)."""
    try:
        run()
    except SystemExit as end:
        if end.code == 130:
            _leave_at_once(130)
        raise


def run() -> None:
    """Runs the command line in a process that may go on afterwards; always raises `SystemExit`."""
    from upg_jax.cli._interrupts import interruptible

    with interruptible():
        try:
            _run()
        except KeyboardInterrupt:  # while modules are imported; `_app` catches it in commands
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def _leave_at_once(code: int) -> None:
    """Ends the process without Python's finalization: XLA's threads crash in it if they are compiling still."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run() -> None:
    from upg_jax._errors import UPGError

    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Names and answers may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from upg_jax.cli._app import app
    except ModuleNotFoundError as e:
        if e.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.exit(f"upg-jax: the command line needs {e.name}; install it with: pip install 'upg-jax[demo]'")
    try:
        app(prog_name="upg-jax")
    except (UPGError, OSError, ValueError) as e:
        from rich.text import Text

        from upg_jax.cli._output import stderr

        advice = _advice(e) if isinstance(e, OSError) else None
        stderr.print(Text.assemble(("error: ", "bold red"), f"{e}; {advice}" if advice else str(e)))
        sys.exit(1)


def _open_closed_streams() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`>&-`) empty ones.

    Python has None instead, and the first file that is opened would take the number, and with it what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # until the process ends


def _advice(error: OSError) -> str | None:
    if error.errno == errno.ENOENT:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the current directory has been removed; change to one that exists (cd)"
    return _ADVICE.get(error.errno or 0)
