"""Between the engine's thread and the event loop: runs a job, and ends it when the client goes or time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from upg_jax.inference import Engine, EngineBusyError, EngineClosedError, Request, StreamedToken
from upg_jax.serve._errors import ApiError, busy, ending, late
from upg_jax.serve._metrics import Metrics
from upg_jax.serve._requests import Job

if TYPE_CHECKING:
    from upg_jax.inference._request import Event


class Running:
    """A job on the engine. Events are kept until they are read, so that a slow reader holds no row."""

    def __init__(self, job: Job, engine: Engine, metrics: Metrics, deadline: float) -> None:
        """Begins.

        Args:
            job: what to answer.
            engine: answers it.
            metrics: counts it.
            deadline: on the event loop's clock, when it fails.
        """
        self._engine, self._metrics = engine, metrics
        self._began = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tokens = 0
        loop = asyncio.get_running_loop()

        def request(choice: int) -> Request:
            def deliver(event: Event) -> None:
                try:
                    loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))
                except RuntimeError:  # the loop has ended, and with it everybody who might listen
                    self._engine.cancel(self._requests[choice])

            return Request(job.prompts[choice // job.n], job.settings[choice], deliver)

        self._requests = [request(choice) for choice in range(len(job.prompts) * job.n)]
        self._left = len(self._requests)
        try:
            engine.submit(self._requests)
        except EngineBusyError as e:
            raise busy(str(e)) from e
        except EngineClosedError as e:
            raise ending() from e
        except ValueError as e:
            raise ApiError(400, str(e)) from e
        # An event like the others: a timer for each token would cost as much as all else that is done with it.
        self._deadline = loop.call_at(deadline, self._events.put_nowait, (0, TimeoutError()))
        metrics.prompt_tokens += sum(map(len, job.prompts))

    async def events(self) -> AsyncIterator[tuple[int, StreamedToken]]:
        """Yields each answer's tokens as they come, and their ends.

        Raises:
            ApiError: if an answer cannot be finished.
        """
        while self._left:
            choice, event = await self._events.get()
            if isinstance(event, TimeoutError):
                raise late()
            if isinstance(event, EngineClosedError):
                raise ending()
            if isinstance(event, Exception):
                raise ApiError(500, "the answer could not be computed; the server's log says why") from event
            if not self.tokens:
                self._metrics.first_token.observe(time.monotonic() - self._began)
            self.tokens += event.id is not None
            self._left -= event.finish_reason is not None
            yield choice, event
        self._metrics.duration.observe(time.monotonic() - self._began)

    def end(self) -> None:
        """Frees whatever is still held; to be called however a job ends."""
        self._deadline.cancel()
        # What was not read goes now, not when Python next looks for cycles such as this object's.
        self._events = asyncio.Queue()
        if self._left:
            for request in self._requests:
                self._engine.cancel(request)
        self._metrics.generated_tokens += self.tokens
        self._metrics.cancelled += self._left > 0
