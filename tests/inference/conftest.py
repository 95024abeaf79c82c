"""What tests of inference share."""

from __future__ import annotations

import pytest


@pytest.fixture
def compilations():
    """Counts programs that XLA compiles, whoever asks for them."""
    from jax import monitoring

    counted, counting = [], [True]

    def count(event, duration, **_):
        if counting and event == "/jax/core/compile/backend_compile_duration":
            counted.append(event)

    monitoring.register_event_duration_secs_listener(count)
    yield counted
    counting.clear()
