"""What is asked of an engine, and what may be answered instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from upg_jax._errors import UPGError
from upg_jax.inference._answer import Answer, StreamedToken
from upg_jax.inference._settings import GenerationSettings

Event = StreamedToken | Exception
"""What a request receives: tokens, the last with a reason for ending, or an error in its place."""


class EngineBusyError(UPGError, RuntimeError):
    """As many requests wait as may."""


class EngineClosedError(UPGError, RuntimeError):
    """The engine takes no more requests, or ended before an answer did."""


class Request:
    """One answer that is wanted.

    Attributes:
        prompt: token ids.
        settings: how to answer.
        state: where it stands; `"ended"` also when cancelled.
        answer: what it was answered so far.
    """

    def __init__(
        self, prompt: Sequence[int], settings: GenerationSettings, deliver: Callable[[Event], None]
    ) -> None:
        """Describes a request.

        Args:
            prompt: token ids.
            settings: how to answer.
            deliver: called with each `Event`, from the engine's thread: must neither block nor raise.
        """
        self.prompt = list(prompt)
        self.settings = settings
        self.deliver = deliver
        self.state: Literal["new", "waiting", "running", "ended"] = "new"
        self.answer: Answer | None = None
