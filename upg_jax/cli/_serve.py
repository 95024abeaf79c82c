"""`upg-jax serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from upg_jax.cli._interrupts import interruptible
from upg_jax.cli._options import DtypeOption, ModelArgument, PackOption


# The first process of a container would not be ended by it otherwise.
@interruptible(signal.SIGTERM)
def serve(
    path: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model. Default: the file's name.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients must send as a bearer token.", envvar="UPG_JAX_API_KEY", show_default=False
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are computed at the same time.")] = 8,
    context: Annotated[int, typer.Option(min=8, help="Tokens of a prompt and its answer, at most.")] = 2048,
    chunk: Annotated[
        int,
        typer.Option(min=16, help="Prompt tokens between two steps of the others: 16, 32, 48, 64, 96, ..."),
    ] = 128,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait for a slot.")] = 64,
    max_choices: Annotated[int, typer.Option(min=1, help="Answers that one request may ask for.")] = 32,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 1 << 20,
    max_bodies: Annotated[
        int, typer.Option(min=1, help="Requests whose bodies may be on their way at the same time.")
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request's body may take to come.")
    ] = 30.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests may take to finish when the server ends.")
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Lets web pages of this origin use the server; may be repeated.", show_default=False
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of this server, such as a proxy's in front of it; may be repeated. A server that listens on "
            "this machine's own address answers only requests for one of its names.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    pack: PackOption = None,
) -> None:
    """Serves a model to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    from upg_jax._errors import MissingDependencyError
    from upg_jax.cli._output import status, stderr

    try:
        import h11  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError(
            f'serve: needs the package {e.name}; pip install "upg-jax[serve]"'
        ) from e
    from upg_jax.inference import Engine, UPGModel
    from upg_jax.serve import Limits, bind, create_app, run
    from upg_jax.serve._access import Access, is_loopback, own_hosts, url_of

    try:
        Access(api_key, allow_host or ())
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint="--api-key, --allow-host") from e
    limits = Limits(
        body_bytes=max_body,
        bodies=max_bodies,
        choices=max_choices,
        seconds=timeout,
        body_seconds=body_timeout,
        shutdown_seconds=shutdown_timeout,
    )
    listener = bind(host, port)
    address = listener.getsockname()[0]
    hosts = own_hosts(address, host, allow_host or ())
    with status(f"opening {path}") as say:
        model = UPGModel.from_file(path, dtype=dtype, pack=pack)
        say("compiling")
        engine = Engine(model, slots=slots, context=context, chunk=chunk, max_waiting=max_waiting)
        engine.warm_up()
    called = name or path.resolve().name
    app = create_app(
        engine, name=called, limits=limits, api_key=api_key, cors_origins=cors_origin or (), hosts=hosts
    )
    stderr.print(f"serving {called} on {url_of(host, port)}/v1, {slots} slots of {engine.context} tokens")
    if not is_loopback(address) and api_key is None:
        stderr.print("anybody who reaches this address can use it: --api-key asks for a key", style="yellow")
    run(app, engine, listener, limits)
