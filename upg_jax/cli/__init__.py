"""The `upg-jax` command. Nothing here imports jax until a command needs it."""

from __future__ import annotations

import errno
import io
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
    from upg_jax.cli._interrupts import interruptible

    with interruptible():
        try:
            _main()
        except KeyboardInterrupt:  # while modules are imported; commands have their own words
            sys.exit(130)


def _main() -> None:
    from upg_jax._errors import UPGError

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

        advice = _ADVICE.get(e.errno or 0) if isinstance(e, OSError) else None
        stderr.print(Text.assemble(("error: ", "bold red"), f"{e}; {advice}" if advice else str(e)))
        sys.exit(1)
