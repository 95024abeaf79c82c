"""Collects the commands, one module each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from upg_jax._version import __version__
from upg_jax.cli import (
    _bench,
    _chat,
    _compress,
    _convert,
    _demo,
    _doctor,
    _evaluate,
    _generate,
    _inspect,
    _recover,
    _report,
    _serve,
)


class _Commands(TyperGroup):
    """Says that a command was interrupted, in the command's words if it raised the interrupt anew with some."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            from upg_jax.cli._output import stderr

            stderr.print(str(e) or "interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Compressed linear layers for JAX: compress, inspect and run language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"upg-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("demo")(_demo.demo)
app.command("compress")(_compress.compress)
app.command("recover")(_recover.recover)
app.command("convert")(_convert.convert)
app.command("inspect")(_inspect.inspect)
app.command("verify")(_inspect.verify)
app.command("eval")(_evaluate.evaluate)
app.command("report")(_report.report)
app.command("generate")(_generate.generate)
app.command("chat")(_chat.chat)
app.command("serve")(_serve.serve)
app.command("bench")(_bench.bench)
app.command("doctor")(_doctor.doctor)
