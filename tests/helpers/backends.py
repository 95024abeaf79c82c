"""The implementations of `sparse_dense` that the transform tests run on."""

from __future__ import annotations

import pytest

from upg_jax._sparse_dense import BACKENDS, unavailable_reason


def _params(is_slow) -> list:
    params = []
    for name in BACKENDS:
        if reason := unavailable_reason(name):
            marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")]
        else:
            marks = [pytest.mark.slow] if is_slow(name) else []
        params.append(pytest.param(name, marks=marks))
    return params


_QUICKEST = "reference" if unavailable_reason("native") else "native"

EVERY_BACKEND = _params(lambda name: False)
# The rules of the transforms are the same on all of them: the one that compiles fastest shows most mistakes.
QUICKEST_BACKEND = _params(lambda name: name != _QUICKEST)
