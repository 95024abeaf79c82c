"""Clients of an engine."""

from __future__ import annotations

import queue
import threading

from upg_jax.inference import GenerationSettings, Request


class Client:
    """Collects what a request receives."""

    def __init__(self, prompt, **settings):
        self.events = queue.SimpleQueue()
        self.request = Request(prompt, GenerationSettings(**settings), self.events.put)

    def result(self):
        ids, logprobs = [], []
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if event.finish_reason:
                return ids, logprobs, event.finish_reason
            ids.append(event.id)
            logprobs.append(event.logprobs)


def answered(engine, prompt, **settings):
    client = Client(prompt, **settings)
    engine.submit([client.request])
    return client.result()


def idle(engine, seconds=20):
    """Waits until nothing runs; the engine frees rows at the beginning of a step."""
    give_up = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if engine.running == engine.waiting == 0:
            return True
        give_up.wait(0.01)
    return False
