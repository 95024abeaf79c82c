"""Numbers about a server, in the text format of Prometheus."""

from __future__ import annotations

import bisect
import collections
import math

from upg_jax.inference import Engine

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts of seconds in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self.sum += seconds


class Metrics:
    """What happened since the server began; used from its event loop only."""

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cancelled = 0
        self.first_token = Histogram()
        self.duration = Histogram()

    def render(self, engine: Engine) -> str:
        """The page that Prometheus reads."""
        lines: list[str] = []

        def metric(name: str, kind: str, about: str, *samples: tuple[str, float]) -> None:
            name = f"upg_jax_{name}"
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value}" for labels, value in samples)

        def histogram(name: str, about: str, of: Histogram) -> None:
            total, samples = 0, list[tuple[str, float]]()
            for bound, count in zip((*_BOUNDS, math.inf), of.counts, strict=True):
                total += count
                samples.append((f'_bucket{{le="{"+Inf" if bound == math.inf else bound}"}}', total))
            metric(name, "histogram", about, *samples, ("_sum", of.sum), ("_count", total))

        requests = [
            (f'{{path="{path}",status="{status}"}}', count) for (path, status), count in self.requests.items()
        ]
        metric("requests_total", "counter", "HTTP requests by path and status.", *requests)
        metric("prompt_tokens_total", "counter", "Tokens of prompts.", ("", self.prompt_tokens))
        metric("generated_tokens_total", "counter", "Tokens of answers.", ("", self.generated_tokens))
        metric(
            "cancelled_total",
            "counter",
            "Requests that ended before their answers did.",
            ("", self.cancelled),
        )
        metric("slots", "gauge", "Rows of the running batch.", ("", engine.slots))
        metric("slots_used", "gauge", "Rows that answer a request now.", ("", engine.running))
        metric("waiting", "gauge", "Answers that wait for a row.", ("", engine.waiting))
        histogram("first_token_seconds", "From a request to its first token.", self.first_token)
        histogram("request_seconds", "From a request to the end of its answer.", self.duration)
        return "\n".join(lines) + "\n"
