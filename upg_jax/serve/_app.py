"""The routes: what OpenAI's clients ask for, health, and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from upg_jax.inference import Engine, TokenLogprobs
from upg_jax.serve._access import Access, check_json
from upg_jax.serve._answering import Running
from upg_jax.serve._connection import ClientGoneError, EventStream, read_body, unless_gone
from upg_jax.serve._errors import ApiError, busy
from upg_jax.serve._fields import parse_object
from upg_jax.serve._limits import Limits
from upg_jax.serve._metrics import Metrics
from upg_jax.serve._requests import Job, parse_chat, parse_completion
from upg_jax.serve._responses import Writer

Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The handlers of one model's server.

    Attributes:
        ended: set when the server ends.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, access: Access) -> None:
        self._engine, self._name, self._limits, self._access = engine, name, limits, access
        self._metrics = Metrics()
        self._created = int(time.time())
        self._reading = self._parsing = 0
        self.ended = asyncio.Event()

    def routes(self) -> list[Route]:
        """Everything that is served."""
        handlers: list[tuple[str, str, Handler, bool]] = [
            ("POST", "/v1/chat/completions", self.chat, True),
            ("POST", "/v1/completions", self.complete, True),
            ("GET", "/v1/models", self.models, True),
            ("GET", "/v1/models/{model:path}", self.model, True),
            ("GET", "/health", self.health, False),
            ("GET", "/metrics", self.metrics, False),
        ]
        return [
            Route(path, self._wrapped(path, handler, secret), methods=[method])
            for method, path, handler, secret in handlers
        ]

    def _wrapped(self, path: str, handler: Handler, secret: bool) -> Handler:
        async def handle(request: Request) -> Response:
            status = 500
            try:
                self._access.check_host(request)
                if secret:
                    self._access.check_key(request)
                response = await handler(request)
                status = response.status_code
                return response
            except ApiError as e:
                status = e.status
                return error_response(e)
            except ClientGoneError:
                status = 499
                return Response(status_code=status)  # nobody reads it
            finally:
                self._metrics.requests[path, status] += 1

        return handle

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._answer(request, parse_chat)

    async def complete(self, request: Request) -> Response:
        """`/v1/completions`."""
        return await self._answer(request, parse_completion)

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        if request.path_params["model"] != self._name:
            raise ApiError(404, "this model does not exist", param="model", code="model_not_found")
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(
            self._metrics.render(self._engine), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "upg-jax"}

    async def _answer(self, request: Request, parse: Callable[..., Job]) -> Response:
        engine, limits = self._engine, self._limits
        deadline = asyncio.get_running_loop().time() + limits.seconds
        job = await self._understood(await self._body(request), parse)
        writer = Writer(job, self._name, engine.model.tokenizer)
        running = Running(job, engine, self._metrics, deadline)
        if job.stream:
            return EventStream(_events(job, running, writer), running.end, deadline)
        try:
            return JSONResponse(await unless_gone(request.receive, _whole(job, running, writer)))
        finally:
            running.end()

    async def _body(self, request: Request) -> bytes:
        """Reads a body, if not too many are on their way: each holds memory."""
        limits = self._limits
        check_json(request)
        if self._reading >= limits.bodies:
            raise busy("as many requests are on their way as may; try again later")
        self._reading += 1
        try:
            seconds = min(limits.body_seconds, limits.seconds)
            return await read_body(request, limits.body_bytes, seconds, self.ended)
        finally:
            self._reading -= 1

    async def _understood(self, body: bytes, parse: Callable[..., Job]) -> Job:
        """Parses a body in a thread: tokenizing a long prompt takes a while, in which others are served."""
        engine = self._engine
        choices = min(self._limits.choices, engine.slots + engine.max_waiting)
        # Who is tokenized waits for a row as well, or else any number of long prompts could.
        if self._parsing >= engine.room:
            raise busy("as many requests are being answered or wait as may; try again later")
        self._parsing += 1
        try:
            return await asyncio.to_thread(
                lambda: parse(parse_object(body), engine.model, self._name, engine.context, choices)
            )
        finally:
            self._parsing -= 1


async def _whole(job: Job, running: Running, writer: Writer) -> dict[str, Any]:
    count = len(job.prompts) * job.n
    texts, reasons, logprobs = [""] * count, [""] * count, [list[TokenLogprobs]() for _ in range(count)]
    async for choice, event in running.events():
        texts[choice] += event.text
        reasons[choice] = event.finish_reason or ""
        logprobs[choice] += [event.logprobs] if event.logprobs is not None else []
    return writer.whole(texts, reasons, logprobs, running.tokens)


async def _events(job: Job, running: Running, writer: Writer) -> AsyncIterator[str]:
    """The data of a stream's events."""
    try:
        for piece in writer.beginnings():
            yield json.dumps(piece)
        async for choice, event in running.events():
            entries = [event.logprobs] if event.logprobs is not None else []
            if event.text or entries or event.finish_reason:
                yield json.dumps(writer.piece(choice, event.text, entries, event.finish_reason))
        if job.include_usage:
            yield json.dumps(writer.usage(running.tokens))
    except ApiError as e:
        yield json.dumps(e.body)
    yield "[DONE]"


def error_response(error: ApiError) -> Response:
    """An error as a client expects it."""
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _failure(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed; its log says why"))


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> Starlette:
    """Makes the ASGI application that answers with an engine.

    Args:
        engine: which model, and how many requests at a time. The application does not close it.
        name: what clients call the model.
        limits: what is refused.
        api_key: what clients of `/v1` must send; None lets everybody in.
        cors_origins: web pages of these origins may use the server from a browser.
        hosts: names and addresses that requests may be for; none lets them be for any. A server that is for this
            machine alone should have some, or web pages can reach it under names of their own.

    Returns:
        The application. Requests whose bodies have not come are refused as soon as its `state.ended` is set.

    Raises:
        ValueError: for a key that no client can send.
    """
    cors = Middleware(
        CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"]
    )
    server = Server(engine, name, limits or Limits(), Access(api_key, hosts))
    app = Starlette(
        routes=server.routes(),
        middleware=[cors] if cors_origins else [],
        exception_handlers={HTTPException: _http_error, Exception: _failure},
    )
    app.router.redirect_slashes = False  # a redirection would repeat any Host
    app.state.ended = server.ended
    return app
