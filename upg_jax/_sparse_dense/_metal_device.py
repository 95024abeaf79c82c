"""The devices behind backends `metal` and `emulator`, and the XLA custom calls that launch kernels on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from metal_ops import (
    Array,
    Call,
    Device,
    Memory,
    MetalError,
    Work,
    check_device,
    open_apple_device,
    open_emulated_device,
    prime_table,
    register_call,
)
from upg_jax import _mapped_memory

_OPERATIONS: dict[str, Literal["product", "transposed", "decode"]] = {
    "products": "product",
    "transposed": "transposed",
    "decode": "decode",
}
_PLANES = ("scales", "row_pointers", "values", "deltas", "prime_indices")
_PRIME_TABLE = prime_table().tobytes()
_files_seen: dict[str, int] = {}


def unavailable_reason(backend: str) -> str | None:
    """Says why a backend's device cannot be used; None where it can."""
    found = _open(backend)
    return found if isinstance(found, str) else None


def device(backend: str) -> Device:
    """The device of backend `"metal"` or `"emulator"`.

    Raises:
        MetalError: if there is none, saying why.
    """
    found = _open(backend)
    if isinstance(found, str):
        raise MetalError(found)
    return found


@functools.cache
def _open(backend: str) -> Device | str:
    try:
        opened = open_apple_device() if backend == "metal" else open_emulated_device()
        # Nobody has seen this run on a Mac yet: a device must first get a product right.
        check_device(opened)
    except MetalError as error:
        return str(error)
    except Exception as error:
        # Whatever PyObjC does that was not foreseen must not keep the processor from being used.
        return f"Metal: {type(error).__name__}: {error}; please report what `upg-jax doctor --metal` prints"
    # All of them, so that exported programs run in a process that lowers none.
    for operation in _OPERATIONS:
        register(operation, backend)
    return opened


def register(operation: str, backend: str) -> str:
    """Makes an operation callable from XLA; returns the custom call's name."""
    target = f"upg_jax.{backend}.{operation}.v1"
    register_call(target, functools.partial(_run, operation, backend))
    return target


def prepare(operation: str, backend: str, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Compiles what a call will launch, while the program is compiled and not when it runs.

    Args:
        operation: of the call.
        backend: of the call.
        operands: anything with the shapes and dtypes of the call's operands.
        results: of its results.
    """
    described = [
        [Array(0, tuple(a.shape), str(a.dtype), 0) for a in arrays] for arrays in (operands, results)
    ]
    for work, *_ in _works(operation, *described):
        device(backend).plan(work)


def _run(operation: str, backend: str, call: Call) -> None:
    gpu = device(backend)
    if _files_seen.get(backend) != _mapped_memory.count():
        _files_seen[backend] = _mapped_memory.count()
        for owner, address, nbytes in _mapped_memory.files():
            gpu.keep(address, nbytes, owner)
    # The last operands are what the results begin as, at the results' own addresses.
    operands = call.operands[: len(call.operands) - len(call.results)]
    launches = []
    for work, arrays in _works(operation, operands, call.results):
        memory = {name: Memory(a.address, a.nbytes, written=name == "y") for name, a in arrays.items()}
        if work.manifold == "prime":
            memory["prime_table"] = gpu.resident(_PRIME_TABLE)
        launches += gpu.plan(work).launches(memory)
    if launches:
        gpu.run(launches)


def _works(
    operation: str, operands: Sequence[Array], results: Sequence[Array]
) -> Iterator[tuple[Work, dict[str, Array]]]:
    """What each result of a call is, and the arrays that it is made of.

    Operands are `x` and `index`, except in decoding, and then of each layer scales, row pointers, values, deltas and
    perhaps prime indices. Only scales are float32.
    """
    shared = {} if operation == "decode" else dict(zip(("x", "index"), operands, strict=False))
    planes = operands[len(shared) :]
    starts = [i for i, plane in enumerate(planes) if plane.dtype == "float32"]
    ends = [*starts[1:], len(planes)]
    for begin, end, y in zip(starts, ends, results, strict=True):
        arrays = {**shared, **dict(zip(_PLANES, planes[begin:end], strict=False)), "y": y}
        layers, rows = arrays["scales"].shape
        groups, vectors, columns, dtype = 1, 1, y.shape[-1], "float32"
        if shared:
            x, index = shared["x"], shared["index"]
            groups = math.prod(index.shape)
            vectors = math.prod(x.shape[len(index.shape) : -1])
            columns = x.shape[-1] if operation == "products" else columns
            dtype = x.dtype
        yield (
            Work(
                _OPERATIONS[operation],
                rows,
                columns,
                arrays["values"].shape[-1],
                layers,
                groups,
                vectors,
                "prime" if "prime_indices" in arrays else "unit",
                dtype,
            ),
            arrays,
        )
