"""A client's connection: its body, its stream of events, and noticing that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from upg_jax.serve._errors import ApiError, ending

Result = TypeVar("Result")

# Whether this request's connection is to be closed in the middle of its answer, for which applications have no word.
cut_off: ContextVar[bool] = ContextVar("cut_off", default=False)


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def read_body(request: Request, limit: int, seconds: float, ended: asyncio.Event) -> bytes:
    """Reads a body, but not more of it than may be, nor for longer.

    Args:
        request: whose body.
        limit: bytes.
        seconds: from now on.
        ended: set when the server ends, which waits for no client.

    Raises:
        ApiError: if it is larger or slower.
        ClientGoneError: if it does not come.
    """
    close = {"Connection": "close"}  # what is left of the request is no other request
    try:
        async with asyncio.timeout(seconds):
            return await _unless(ended.wait(), ending(close), _body(request, limit, close))
    except TimeoutError:
        message = f"the request's body may take {seconds:g} seconds to come"
        raise ApiError(408, message, code="timeout", headers=close) from None
    except ClientDisconnect as e:
        raise ClientGoneError from e


async def _body(request: Request, limit: int, close: dict[str, str]) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ApiError(413, f"the request's body may have {limit} bytes", headers=close)
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`, and cancels it as soon as the client is gone.

    Raises:
        ClientGoneError: if it is.
    """
    return await _unless(_gone(receive), ClientGoneError(), work)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(
    obstacle: Coroutine[Any, Any, object], error: Exception, work: Coroutine[Any, Any, Result]
) -> Result:
    """Awaits `work`; raises `error` if the obstacle comes first."""
    task, other = asyncio.ensure_future(work), asyncio.ensure_future(obstacle)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            other.result()  # an obstacle that failed is another error
            raise error
        return task.result()
    finally:
        task.cancel()
        other.cancel()
        await asyncio.gather(task, other, return_exceptions=True)


class EventStream(Response):
    """Server-sent events."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None], deadline: float) -> None:
        """Describes a stream.

        Args:
            events: the data of each.
            end: called at the end, whatever it is.
            deadline: on the event loop's clock, when a client that does not read is cut off.
        """
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        # Its length is not known before its end.
        del self.headers["content-length"]
        self._events, self._end, self._deadline = events, end, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            # What an answer takes too long for is said in the stream, a moment before.
            limit = asyncio.timeout_at(self._deadline + 1)
            with contextlib.suppress(ClientGoneError, OSError):
                async with limit:
                    await unless_gone(receive, self._send_all(send))
            cut_off.set(limit.expired())
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
