"""The implementations of `sparse_dense` that the transform tests run on."""

from __future__ import annotations

import pytest

from upg_jax._sparse_dense import BACKENDS, unavailable_reason


def _param(name: str):
    reason = unavailable_reason(name)
    return pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else [])


BACKEND_PARAMS = [_param(name) for name in BACKENDS]
