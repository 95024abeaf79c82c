"""Servers on loopback, in threads of the tests' process."""

from __future__ import annotations

import contextlib
import threading
import time


@contextlib.contextmanager
def serving(app, listener=None):
    """Runs an application in a thread, on a socket of the caller's if there is one; yields its address."""
    import uvicorn

    from upg_jax.serve._run import configuration

    server = uvicorn.Server(configuration(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener] if listener else None,))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()
