from __future__ import annotations

import pytest

from upg_jax._sparse_dense import unavailable_reason, use_backend


@pytest.fixture
def emulator():
    """The device of backend `emulator`, which is forced for the test."""
    if reason := unavailable_reason("emulator"):
        pytest.skip(f"backend emulator: {reason}")
    from upg_jax._sparse_dense import _metal_device

    with use_backend("emulator"):
        yield _metal_device.device("emulator")
