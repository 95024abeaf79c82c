"""Python functions as XLA custom calls: answers, errors, loops, threads, recursion, signals."""

from __future__ import annotations

import concurrent.futures
import ctypes
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.versions import enable_x64

from metal_ops import Call, _ffi, register_call
from metal_ops._ffi import _guard, make_handler

FAILURES = (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, RecursionError, MemoryError)
seen: list[Call] = []
threads: set[int] = set()


def copy(call: Call) -> None:
    seen[:] = [call]
    threads.add(threading.get_ident())
    source, target = call.operands[0], call.results[0]
    ctypes.memmove(target.address, source.address, source.nbytes)


def fail(call: Call) -> None:
    raise FAILURES[int(np.ctypeslib.as_array((ctypes.c_int32 * 1).from_address(call.operands[0].address))[0])]


class UnprintableError(Exception):
    def __str__(self):
        raise ZeroDivisionError


def fail_unprintably(call: Call) -> None:
    raise UnprintableError


@pytest.fixture(scope="module", autouse=True)
def calls():
    before = signal.getsignal(signal.SIGINT)
    register_call("metal_ops.test.copy", copy)
    register_call("metal_ops.test.fail", fail)
    register_call("metal_ops.test.unprintable", fail_unprintably)
    yield
    signal.signal(signal.SIGINT, before)


def call(name, *operands):
    result = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)
    return jax.ffi.ffi_call(f"metal_ops.test.{name}", result)(*operands)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_arrays_arrive_as_they_are(dtype, shape):
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(jax.jit(lambda x: call("copy", x))(x), x)
    (operand,) = seen[0].operands
    assert (operand.shape, operand.dtype, operand.nbytes) == (shape, dtype, x.nbytes)
    assert seen[0].results[0].shape == shape


def test_sixty_four_bits():
    with enable_x64():
        for dtype in (np.float64, np.int64, np.uint64):
            x = np.array([1, 2**40], dtype)
            np.testing.assert_array_equal(jax.jit(lambda x: call("copy", x))(x), x)


def test_an_empty_operand():
    program = jax.jit(lambda x, y: call("copy", x, y))
    np.testing.assert_array_equal(program(np.ones(3), np.ones((2, 0, 5), np.int8)), np.ones(3))
    assert (seen[0].operands[1].shape, seen[0].operands[1].nbytes) == ((2, 0, 5), 0)


def test_operands_and_results_in_order():
    jax.jit(lambda *xs: call("copy", *xs))(
        np.zeros(3, np.float32), np.zeros((2, 5), np.int8), np.zeros(7, ml_dtypes.bfloat16)
    )
    assert [(o.shape, o.dtype) for o in seen[0].operands] == [
        ((3,), "float32"),
        ((2, 5), "int8"),
        ((7,), "bfloat16"),
    ]
    assert len({o.address for o in seen[0].operands}) == 3


@pytest.mark.parametrize("which", range(len(FAILURES)), ids=[f.__name__ for f in FAILURES])
def test_whatever_is_raised_becomes_an_error_of_the_program(which):
    program = jax.jit(lambda x: call("fail", x))
    for _ in range(3):  # jit's first and later calls raise in different places
        with pytest.raises((RuntimeError, ValueError), match=FAILURES[which].__name__):
            program(np.int32(which)).block_until_ready()
    # The process goes on.
    np.testing.assert_array_equal(jax.jit(lambda x: call("copy", x))(np.ones(2)), np.ones(2))


def test_an_exception_that_cannot_be_printed():
    with pytest.raises((RuntimeError, ValueError), match="without a message"):
        jax.jit(lambda x: call("unprintable", x))(np.ones(2)).block_until_ready()


def test_inside_a_loop_an_error_ends_it():
    def body(i, x):
        return call("fail", x + 1)

    with pytest.raises((RuntimeError, ValueError), match="KeyboardInterrupt"):
        jax.jit(lambda x: jax.lax.fori_loop(0, 1000, body, x))(np.int32(0)).block_until_ready()


def test_many_calls_in_a_scan():
    program = jax.jit(
        lambda x: jax.lax.scan(lambda c, _: (call("copy", c) + 1, None), x, None, length=3000)[0]
    )
    np.testing.assert_array_equal(program(np.zeros(4, np.float32)), np.full(4, 3000))


def test_from_several_threads_at_once():
    program = jax.jit(
        lambda x: jax.lax.scan(lambda c, _: (call("copy", c) + 1, None), x, None, length=300)[0]
    )
    threads.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: program(np.full(4, i, np.float32)), range(16)))
    np.testing.assert_array_equal(found, [[i + 300] * 4 for i in range(16)])
    assert len(threads) > 1


def recurse(depth: int) -> int:
    return recurse(depth - 1) if depth else 0


def test_too_deep_a_recursion_inside_the_function_is_an_error():
    def deep(call: Call) -> None:
        recurse(30)
        copy(call)

    register_call("metal_ops.test.deep", deep)
    program = jax.jit(lambda x: call("deep", x))
    x = jnp.arange(4.0)
    program(x).block_until_ready()

    def descend(depth):
        return descend(depth - 1) if depth else program(x)

    errors = 0
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        try:
            np.testing.assert_array_equal(descend(depth), np.arange(4))
        except (RuntimeError, ValueError) as error:
            errors += "RecursionError" in str(error) or isinstance(error, RecursionError)
        if errors == 10:  # a few frames before the limit not even `except` can be reached
            return
    raise AssertionError("the limit was not reached")


def test_the_metadata_call_is_answered_with_the_oldest_version():
    """As XLA asks: a frame with an extension of kind 1 that points to the answer."""
    metadata = (ctypes.c_uint64 * 8)(*[0xFFFF_FFFF_FFFF_FFFF] * 8)
    extension = (ctypes.c_uint64 * 4)(32, 1, 0, ctypes.addressof(metadata))
    frame = (ctypes.c_uint64 * 32)(0, ctypes.addressof(extension))
    handler = make_handler(lambda call: pytest.fail("the function is not called"))
    assert handler(ctypes.addressof(frame)) is None
    major, minor = (ctypes.c_int * 2).from_buffer(metadata, 24)
    assert (major, minor) == (0, 1)
    assert ctypes.c_uint32.from_buffer(metadata, 32).value == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 4])
def test_other_stages_do_nothing(stage):
    frame = (ctypes.c_uint64 * 32)()
    frame[4] = stage
    handler = make_handler(lambda call: pytest.fail("the function is not called"))
    assert handler(ctypes.addressof(frame)) is None


def test_the_guard_raises_where_no_call_is_running():
    with pytest.raises(KeyboardInterrupt):
        _guard(signal.SIGINT, sys._getframe())


def test_an_interrupt_inside_a_call_fails_the_program_after_it(monkeypatch):
    monkeypatch.setattr(_ffi, "_INTERRUPT_SECONDS", 60.0)  # machines stall

    def interrupted(call: Call) -> None:
        # From another thread, it would reach the main one outside of the call.
        assert threading.current_thread() is threading.main_thread()
        signal.raise_signal(signal.SIGINT)
        copy(call)

    register_call("metal_ops.test.interrupted", interrupted)
    program = jax.jit(lambda x: call("interrupted", x))
    with pytest.raises((RuntimeError, ValueError), match="KeyboardInterrupt"):
        program(np.ones(2, np.float32)).block_until_ready()
    np.testing.assert_array_equal(jax.jit(lambda x: call("copy", x))(np.ones(2)), np.ones(2))


def test_somebody_elses_interrupt_handler_stays():
    def theirs(number, frame):
        pass

    before = signal.signal(signal.SIGINT, theirs)
    try:
        register_call("metal_ops.test.copy", copy)
        jax.jit(lambda x: call("copy", x) + 2)(np.ones(2, np.float32)).block_until_ready()
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)
