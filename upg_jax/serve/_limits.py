"""What a server refuses, so that no request can hold more than its share."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; those of the context, the rows and the queue are the engine's.

    Attributes:
        body_bytes: a request's body.
        bodies: that may be on their way at the same time.
        choices: answers that one request may ask for, over all its prompts.
        seconds: that a request may take, waiting included; then it fails.
        body_seconds: that a request's body may take to come.
        shutdown_seconds: that requests may take to finish after the server is told to end.
    """

    body_bytes: int = 1 << 20
    bodies: int = 256
    choices: int = 32
    seconds: float = 600.0
    body_seconds: float = 30.0
    shutdown_seconds: float = 30.0
