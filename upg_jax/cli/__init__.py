"""The `upg-jax` command. Nothing here imports jax until a command needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; exits with 0, 1 (failed) or 2 (wrong usage)."""
    from upg_jax._errors import UPGError

    try:
        from upg_jax.cli._app import app
    except ModuleNotFoundError as e:
        if e.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.exit(f"upg-jax: the command line needs {e.name}; install it with: pip install 'upg-jax[demo]'")
    try:
        app(prog_name="upg-jax")
    except (UPGError, OSError) as e:
        from upg_jax.cli._output import stderr

        stderr.print(f"[bold red]error:[/] {_escape(str(e))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
