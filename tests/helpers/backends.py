"""The implementations of `sparse_dense` that the transform tests run on.

All that are usable, the emulator of Metal kernels only under `-m slow`; with `UPG_JAX_BACKEND` set, that one alone:
`UPG_JAX_BACKEND=emulator python -m pytest tests/sparse_dense`.
"""

from __future__ import annotations

import os
import sys

import pytest

from upg_jax._sparse_dense import BACKENDS, unavailable_reason

ON_A_GPU = "cuda" in os.environ.get("JAX_PLATFORMS", "")
needs_four_devices = pytest.mark.skipif("__import__('jax').device_count() < 4", reason="needs four devices")
same_bits = pytest.mark.skipif(ON_A_GPU, reason="programs for GPUs add in an order of their own")

_FORCED = os.environ.get("UPG_JAX_BACKEND")
_NAMES = (
    [_FORCED] if _FORCED in BACKENDS else [b for b in BACKENDS if b != "metal" or sys.platform == "darwin"]
)


def _params(is_slow) -> list:
    params = []
    for name in _NAMES:
        if reason := unavailable_reason(name):
            marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")]
        else:
            marks = [pytest.mark.slow] if is_slow(name) else []
        params.append(pytest.param(name, marks=marks))
    return params


_USABLE = [
    name for name in ("native", "reference", *_NAMES) if name in _NAMES and not unavailable_reason(name)
]
_QUICKEST = _USABLE[0] if _USABLE else None

EVERY_BACKEND = _params(lambda name: name == "emulator" and name != _FORCED)
# The rules of the transforms are the same on all of them: the one that compiles fastest shows most mistakes.
QUICKEST_BACKEND = _params(lambda name: name != _QUICKEST)
