"""Runs the server until it is told to end."""

from __future__ import annotations

import contextlib
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

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


def run(app: ASGIApp, engine: Engine, *, host: str, port: int, limits: Limits) -> None:
    """Serves an application until a signal (SIGTERM, Ctrl-C), then finishes or ends its streams, and closes the engine.

    Args:
        app: made by `create_app`.
        engine: the application's.
        host: to bind to.
        port: to bind to.
        limits: the application's.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
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
            _Server(config, engine, limits).run()
    finally:
        engine.close()
