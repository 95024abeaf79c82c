from __future__ import annotations

import pytest

from upg_jax import _native, use_backend

_LIBRARY = _native.load()
_NAMES = _LIBRARY.usable_kernels if _LIBRARY else ["none"]


@pytest.fixture
def library() -> _native.Library:
    if _LIBRARY is None:
        pytest.skip(f"no native library: {_native.unavailable_reason()}")
    return _LIBRARY


@pytest.fixture(params=_NAMES)
def kernels(request, library):
    """Runs a test with every instruction set of this processor; results must be fetched before the test ends."""
    with use_backend("native"), library.use_kernels(request.param):
        yield request.param
