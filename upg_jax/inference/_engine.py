"""Continuous batching: requests join and leave a running batch between its steps."""

from __future__ import annotations

import collections
import logging
import queue
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from upg_jax.inference._answer import Answer
from upg_jax.inference._generate import stop_ids
from upg_jax.inference._logprobs import Chosen, HostChoices
from upg_jax.inference._penalties import History
from upg_jax.inference._prompt_cache import PromptCache
from upg_jax.inference._request import EngineBusyError, EngineClosedError, Event, Request
from upg_jax.inference._sampling import Sampling
from upg_jax.inference._settings import GenerationSettings
from upg_jax.inference._slots import Slots
from upg_jax.inference._steps import PROGRAMS, chunk_length, narrowed

if TYPE_CHECKING:
    from upg_jax.inference._model import UPGModel

_LOG = logging.getLogger("upg_jax.inference")


class Engine:
    """Answers requests of many threads with one model.

    A fixed number of rows decode together; a free row takes in the next prompt chunk by chunk, between two steps of the
    others. What a request is answered depends on the model, the number of rows, `context` and `chunk`, and on its own
    prompt and settings, not on what else is running: to the bit on CPUs with the compiled kernels, elsewhere up to the
    rounding of attention. Nothing compiles after `warm_up`.

    Attributes:
        model: the model.
        context: tokens that a request may have.
        max_waiting: requests that may wait for a row.
        failure: what ended the engine by itself; it is logged, and everybody who waits receives it.
    """

    def __init__(
        self, model: UPGModel, *, slots: int = 8, context: int = 2048, chunk: int = 128, max_waiting: int = 64
    ) -> None:
        """Allocates caches and starts the engine's thread.

        Args:
            model: the model.
            slots: requests that are answered at the same time.
            context: tokens that a request may have, prompt and answer together; at most the model's positions.
            chunk: prompt tokens that are computed between two steps: 16, 32, 48, 64, 96, 128, 192, and so on.
            max_waiting: requests that may wait for a row.
        """
        self.model = model
        self.context = min(context, model.config.max_position_embeddings)
        self.max_waiting = max_waiting
        self.failure: Exception | None = None
        self._chunk = chunk
        if chunk != chunk_length(chunk):
            raise ValueError(
                f"engine: chunk must be 16, 32, 48, 64, 96, 128, 192, and so on; got {chunk}; the next is "
                f"{chunk_length(chunk)}"
            )
        vocabulary = model.config.vocab_size
        stops = stop_ids(model, GenerationSettings()).size
        self._slots = Slots.create(model.init_cache(slots, self.context), vocabulary, stops)
        self._rows: list[Request | None] = [None] * slots
        self._prompt = PromptCache(model, self.context, chunk)
        self._pending: collections.deque[tuple[Chosen, list[tuple[int, Request]]]] = collections.deque()
        self._waiting: collections.deque[Request] = collections.deque()
        self._wake = threading.Condition()
        self._closing: Literal["", "drain", "now"] = ""
        self._thread = threading.Thread(target=self._run, name="upg-jax engine", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Requests that are answered at the same time."""
        return len(self._rows)

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return self._thread.is_alive() and self._closing != "now"

    @property
    def running(self) -> int:
        """Requests that have a row now."""
        return sum(request is not None for request in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row, or whose prompt is being computed."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Requests that would be taken now: free rows and free places to wait."""
        # The row of a request that has ended is free before the next step.
        answered = sum(request is not None and request.state != "ended" for request in self._rows)
        return self.slots + self.max_waiting - answered - len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests: all or none of them.

        Raises:
            EngineBusyError: if they are more than free rows and places to wait.
            EngineClosedError: if the engine is closed.
            ValueError: for a request that does not fit into the context, or whose tokens or settings are not for this
                model.
        """
        for request in requests:
            tokens, new = len(request.prompt), request.settings.max_new_tokens
            if tokens < 1 or new < 1 or tokens + new > self.context:
                raise ValueError(
                    f"engine: prompt and max_new_tokens must be at least 1 token each and at most {self.context} "
                    f"together; got {tokens} and {new}"
                )
            self.model.encode(request.prompt)
            request.settings.check_vocabulary(self.model.config.vocab_size)
            if request.settings.seed is None:
                request.settings = request.settings.with_seed(secrets.randbits(63))
            request.answer = Answer(self.model.tokenizer, request.settings, self.model.eos_token_ids)
        with self._wake:
            if self._closing:
                raise EngineClosedError("engine: is closed and takes no more requests") from self.failure
            if len(requests) > self.room:
                raise EngineBusyError(
                    f"engine: has room for {self.room} more requests; got {len(requests)}; try again later"
                )
            for request in requests:
                request.state = "waiting"
            self._waiting.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request; its row is free before the next step. At most one more event is delivered."""
        with self._wake:
            request.state = "ended"
            if request in self._waiting:
                self._waiting.remove(request)
            self._wake.notify()

    def close(self, timeout: float | None = 0.0) -> None:
        """Takes no more requests, and ends.

        Args:
            timeout: seconds that requests may take to finish; those that remain then receive an `EngineClosedError`.
        """
        with self._wake:
            self._closing = "drain"
            self._wake.notify()
        self._thread.join(timeout)
        with self._wake:
            self._closing = "now"
            self._wake.notify()
        self._thread.join()

    def warm_up(self) -> None:
        """Compiles everything that requests may need."""
        lengths = [1, chunk_length(1)]  # one more, so that a row is freed while this waits
        while lengths[-1] < self._chunk:
            lengths.append(chunk_length(lengths[-1] + 1))
        for length in lengths:
            self._answer(length)
        for asked in PROGRAMS:
            self._answer(1, temperature=float("draws" in asked), top_p=0.5 if "top_p" in asked else None)
        self._answer(1, logprobs=1)  # of no program's wishes

    def _answer(self, length: int, **settings: Any) -> None:
        """Answers a prompt that nobody reads."""
        prompt = [0] * max(min(length, self.context - 4), 1)
        wanted = GenerationSettings(max_new_tokens=4, stop_at_eos=False, **settings)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit([Request(prompt, wanted, events.put)])
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            if event.finish_reason is not None:
                return

    def _run(self) -> None:
        try:
            while self._wait():
                self._take_in()
                self._step()
            self._end(EngineClosedError("engine: was closed before the answer was finished"))
        except BaseException as e:  # a panic in Rust, too: nobody may wait for an answer for ever
            _LOG.error("the engine failed and answers no more requests", exc_info=e)
            failure = e if isinstance(e, Exception) else RuntimeError(f"{type(e).__name__}: {e}")
            with self._wake:
                self.failure, self._closing = failure, "now"
            self._end(failure)

    def _wait(self) -> bool:
        """Waits for work; false if the engine shall end."""
        with self._wake:
            while not (self._waiting or self.running or self._pending or self._closing):
                self._wake.wait()
            idle = not (self._waiting or self.running or self._pending)
            return self._closing != "now" and not (self._closing and idle)

    def _end(self, error: Exception) -> None:
        with self._wake:
            left = [*self._waiting, *(request for request in self._rows if request is not None)]
            self._waiting.clear()
            self._rows = [None] * self.slots
        for request in left:
            if request.state != "ended":
                request.state = "ended"
                request.deliver(error)

    def _take_in(self) -> None:
        """Frees rows, and takes in prompts that wait as long as rows are free, a chunk's worth of tokens in all."""
        for row, ended in enumerate(self._rows):
            if ended is not None and ended.state == "ended":
                self._slots, self._rows[row] = self._slots.release(row), None
        left = self._chunk
        while left > 0:
            with self._wake:
                request = self._waiting[0] if self._waiting and None in self._rows else None
            if request is None:
                return
            left -= self._prompt.advance(request.prompt)
            if self._prompt.complete:
                self._admit(request)

    def _admit(self, request: Request) -> None:
        """Gives a request whose prompt is computed a free row."""
        with self._wake:
            if request.state != "waiting":
                return  # cancelled meanwhile
            self._waiting.popleft()
            request.state = "running"
            row = self._rows.index(None)
            self._rows[row] = request
        model, settings = self.model, request.settings
        chosen, self._slots = self._slots.admit(
            row,
            self._prompt.cache,
            self._prompt.logits,
            Sampling.of(1, settings, settings.seed),
            History.create([request.prompt], settings, model.config.vocab_size),
            stop_ids(model, settings)[None],
        )
        self._pending.append((chosen, [(0, request)]))

    def _step(self) -> None:
        """Starts a step of all rows, and passes on what those before it chose."""
        active = [(row, request) for row, request in enumerate(self._rows) if request is not None]
        if active:
            asked = narrowed(frozenset().union(*(request.settings.asked for _, request in active)))
            chosen, self._slots = self._slots.step(self.model.params, self.model.config, asked)
            self._pending.append((chosen, active))
        # The newest step runs while what the others chose becomes text.
        while len(self._pending) > bool(active):
            chosen, rows = self._pending.popleft()
            host = HostChoices(chosen)
            for row, request in rows:
                if request.state == "running":
                    self._pass_on(request, host, row)

    def _pass_on(self, request: Request, host: HostChoices, row: int) -> None:
        answer = request.answer
        assert answer is not None
        token = answer.push(host.tokens[row], host.logprobs(row, request.settings.logprobs))
        if token is not None:
            request.deliver(token)
        if answer.finish_reason is not None:
            request.state = "ended"
            request.deliver(answer.finish())
