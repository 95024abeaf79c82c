"""What a server refuses, so that no request can hold more than its share."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; those of the context, the rows and the queue are the engine's.

    Attributes:
        body_bytes: a request's body.
        choices: answers that one request may ask for, over all its prompts.
        seconds: that a request may take, waiting included; then it fails.
        shutdown_seconds: that requests may take to finish after the server is told to end.
    """

    body_bytes: int = 1 << 20
    choices: int = 32
    seconds: float = 600.0
    shutdown_seconds: float = 30.0
