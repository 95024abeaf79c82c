"""Runs the server until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from upg_jax._errors import UPGError
from upg_jax.inference import Engine
from upg_jax.serve._connection import cut_off
from upg_jax.serve._limits import Limits

# Bytes of what a client sends before it has its answer: beyond, nothing more is read until then.
_MOST_AHEAD = 1 << 16


class _Protocol(H11Protocol):
    """Uvicorn's, with two differences.

    It says nothing more to a client once it has refused what that sent: its own sends an answer that the application
    gives meanwhile, or a second refusal, which h11 takes for a mistake. And it goes on reading when a client sends
    something before it has its answer: its own would not notice that such a client is gone.
    """

    def handle_events(self) -> None:
        super().handle_events()
        ahead = len(self.conn.trailing_data[0]) if self.conn.their_state is h11.DONE else 0
        if 0 < ahead <= _MOST_AHEAD:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
        self.transport.close()


class _Server(uvicorn.Server):
    """Uvicorn's, which takes no more requests as soon as it is told to end, but finishes those it has.

    It ends by itself when the engine has failed.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, limits: Limits, ended: asyncio.Event) -> None:
        super().__init__(config)
        self._engine, self._limits, self._ended = engine, limits, ended

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ended.set()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            seconds = self._limits.shutdown_seconds
            threading.Thread(target=self._engine.close, args=(seconds,), name="upg-jax shutdown").start()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """Takes an address, where nobody can connect before `run`; one that is in use shows before a model is loaded.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        UPGError: if it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise UPGError(
            f"serve: cannot listen on {host}, port {port}: {e.strerror}; choose another --port or --host"
        ) from e
    return listener


def configuration(app: Starlette, *, log_level: str = "warning", **more: Any) -> uvicorn.Config:
    """How uvicorn is to serve an application."""
    config = uvicorn.Config(
        app, http=_Protocol, log_level=log_level, lifespan="off", ws="none", server_header=False, **more
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut_stream)
    return config


def _is_no_cut_stream(record: logging.LogRecord) -> bool:
    # Uvicorn logs in the request's own task, so in its context.
    return not cut_off.get() or record.getMessage() != "ASGI callable returned without completing response."


def run(app: Starlette, engine: Engine, listener: socket.socket, limits: Limits) -> None:
    """Serves an application until a signal (SIGTERM, Ctrl-C), then finishes or ends its streams, and closes the engine.

    Args:
        app: made by `create_app`.
        engine: the application's.
        listener: from `bind`; closed at the end.
        limits: the application's.

    Raises:
        UPGError: if the engine failed, so that whatever watches over this process starts it again.
    """
    config = configuration(
        app,
        # Streams have ended by then with an error of ours; this is for clients that do not read it.
        timeout_graceful_shutdown=int(limits.shutdown_seconds) + 5,
    )
    try:
        # Uvicorn raises the signal that ended it once more.
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, engine, limits, app.state.ended).run([listener])
    finally:
        engine.close()
    if engine.failure is not None:
        raise UPGError(
            f"serve: the engine failed: {engine.failure!r}; its traceback was logged before; start the server again"
        ) from engine.failure
