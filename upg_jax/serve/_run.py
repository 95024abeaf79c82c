"""Runs the server until it is told to end."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from upg_jax._errors import UPGError
from upg_jax.inference import Engine
from upg_jax.serve._limits import Limits


class _Server(uvicorn.Server):
    """Uvicorn's, which takes no more requests as soon as it is told to end, but finishes those it has."""

    def __init__(self, config: uvicorn.Config, engine: Engine, limits: Limits) -> None:
        super().__init__(config)
        self._engine, self._limits = engine, limits

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


def run(app: ASGIApp, engine: Engine, listener: socket.socket, limits: Limits) -> None:
    """Serves an application until a signal (SIGTERM, Ctrl-C), then finishes or ends its streams, and closes the engine.

    Args:
        app: made by `create_app`.
        engine: the application's.
        listener: from `bind`; closed at the end.
        limits: the application's.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        # Streams have ended by then with an error of ours; this is for clients that do not read it.
        timeout_graceful_shutdown=int(limits.shutdown_seconds) + 5,
    )
    try:
        # Uvicorn raises the signal that ended it once more.
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, engine, limits).run([listener])
    finally:
        engine.close()
