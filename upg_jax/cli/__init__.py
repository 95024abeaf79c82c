"""The `upg-jax` command. Nothing here imports jax until a command needs it."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Runs the command line; exits with 0, 1 (failed) or 2 (wrong usage)."""
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

        stderr.print(Text.assemble(("error: ", "bold red"), str(e)))
        sys.exit(1)
