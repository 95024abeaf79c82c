"""Choosing an implementation: forced by name, part of jit's cache key, never a silent fallback."""

from __future__ import annotations

import contextlib
import threading

import jax
import numpy as np
import pytest
from helpers.backends import ON_A_GPU
from helpers.layers import Case

from upg_jax import BackendError, sparse_dense, use_backend
from upg_jax._sparse_dense import BACKENDS, choose_backend, unavailable_reason

CASE = Case("random", (7, 13))
USABLE = [name for name in BACKENDS if unavailable_reason(name) is None]


def traced_backends(f, *args) -> list[str]:
    """The `backend` parameters of the primitives in a function's jaxpr."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("sparse_dense", "dense_sparse"):
                found.append(eqn.params["backend"])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def test_the_reference_is_always_usable():
    assert "reference" in USABLE


@pytest.mark.parametrize("name", USABLE)
def test_a_forced_backend_is_bound_and_named_as_forced(name):
    with use_backend(name):
        assert set(traced_backends(lambda x: sparse_dense(x, CASE.layer), CASE.x(2))) == {name}
        assert choose_backend("cpu") == (name, "forced by use_backend")


def test_gradients_use_the_backend_of_their_product():
    def gradient(x):
        return jax.grad(lambda x: sparse_dense(x, CASE.layer).sum())(x)

    with use_backend("reference"):
        assert traced_backends(gradient, CASE.x(2)) == ["reference", "reference"]


def test_switching_retraces_a_jitted_function():
    traces = []

    @jax.jit
    def product(x):
        traces.append(1)
        return sparse_dense(x, CASE.layer)

    x = CASE.x(2)
    with use_backend("auto"):
        first = product(x)
        product(x)
    assert len(traces) == 1
    with use_backend("reference"):
        second = product(x)
        product(x)
    assert len(traces) == 2
    with use_backend("auto"):
        product(x)
    # JAX before `make_user_context` has no public way into jit's cache key: all is traced again.
    assert len(traces) == (2 if hasattr(jax, "make_user_context") else 3)
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.skipif(ON_A_GPU, reason="one program runs on one platform, whose kernels are of one backend")
def test_one_jitted_function_may_switch_inside():
    @jax.jit
    def both(x):
        outs = []
        for name in USABLE:
            with use_backend(name):
                outs.append(sparse_dense(x, CASE.layer))
        return outs

    assert traced_backends(both, CASE.x(2)) == USABLE
    for y in both(CASE.x(2)):
        np.testing.assert_allclose(y, CASE.x(2) @ CASE.weight.T.astype(np.float32), atol=1e-4)


def test_blocks_nest_and_restore_even_after_an_error():
    with use_backend("reference"):
        with contextlib.suppress(RuntimeError), use_backend("auto"):
            assert choose_backend("cpu")[1] != "forced by use_backend"
            raise RuntimeError
        assert choose_backend("cpu") == ("reference", "forced by use_backend")
    assert choose_backend("cpu")[1] != "forced by use_backend"


def test_the_choice_belongs_to_the_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend("cpu")[1]))
        thread.start()
        thread.join()
    assert seen[0] != "forced by use_backend"


@pytest.mark.parametrize("name", ["fpga", "", "Reference"])
def test_an_unknown_backend_is_an_error_that_lists_the_known(name):
    with pytest.raises(BackendError, match=r"must be one of auto, reference.*; got '"), use_backend(name):
        pass


def test_a_backend_that_cannot_run_here_is_an_error_that_says_why():
    unusable = [n for n in ("native", "metal", "emulator", "cuda") if n not in USABLE]
    for name in unusable:
        with pytest.raises(BackendError, match=f"'{name}' cannot be used here: .+; use 'auto'"):
            use_backend(name).__enter__()


def test_the_environment_variable_forces_one(monkeypatch):
    monkeypatch.setenv("UPG_JAX_BACKEND", "reference")
    assert choose_backend("cpu") == ("reference", "forced by the environment variable UPG_JAX_BACKEND")
    assert traced_backends(lambda x: sparse_dense(x, CASE.layer), CASE.x(2)) == ["reference"]


def test_an_empty_environment_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("UPG_JAX_BACKEND", "")
    unforced = choose_backend("cpu")
    monkeypatch.delenv("UPG_JAX_BACKEND")
    assert choose_backend("cpu") == unforced


def test_use_backend_takes_precedence_over_the_environment(monkeypatch):
    monkeypatch.setenv("UPG_JAX_BACKEND", "fpga")
    with use_backend("reference"):
        assert choose_backend("cpu") == ("reference", "forced by use_backend")


def test_a_wrong_environment_variable_is_an_error_at_the_first_product(monkeypatch):
    monkeypatch.setenv("UPG_JAX_BACKEND", "fpga")
    with pytest.raises(BackendError, match="got 'fpga'"):
        sparse_dense(CASE.x(2), CASE.layer)
