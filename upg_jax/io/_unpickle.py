"""Reads data out of a pickle without ever running one.

`pickle.load` calls what the file names. Here a small stack machine interprets the opcodes, and the only
things it can build are plain values, containers, NumPy arrays and scipy CSR matrices: a name that is not on
the list of `_pickle_values.ALLOWED` is refused when it is met, and a call makes data from checked arguments
or is refused.
"""

from __future__ import annotations

import mmap
import os
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from upg_jax._errors import FormatError
from upg_jax.io._open import looks_like, open_regular
from upg_jax.io._pickle_values import (
    ALLOWED,
    Budget,
    Global,
    PickledArray,
    PickledCSR,
    PickledDType,
    RefusedError,
    construct,
    describe,
    hashable,
    new_csr,
)

# A model has some hundred opcodes a tensor; this keeps a hostile file to some seconds and a gigabyte.
MAX_OPCODES = 10_000_000


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle of plain containers, NumPy arrays and scipy CSR matrices, whole, into memory.

    Returns:
        Plain values, dicts, lists (for sets too), tuples, `PickledArray` and `PickledCSR`.

    Raises:
        FormatError: naming the file, the offset and what is refused; nothing in the file is ever run.
    """
    with open_regular(path) as file:
        start = file.read(64)
        known = looks_like(start)
        if not start or (known is not None and "pickle" not in known):
            raise FormatError(f"{path}: must be a Python pickle; it is {known or 'empty'}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as source:
            return _run(source, path)


def _run(source: mmap.mmap, path: str | os.PathLike[str]) -> Any:
    machine = _Machine(Budget(2 * len(source)))
    offset: int | None = 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(cast(BinaryIO, source))):
            offset = at
            if count == MAX_OPCODES:
                raise RefusedError(f"a model file has fewer than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                if source.tell() != len(source):
                    raise RefusedError("the file must end with the pickle")
                return machine.pop()
            machine.step(opcode.name, argument)
    except RefusedError as error:
        raise FormatError(f"{path}: offset {offset}: {error}; nothing in the file was run") from None
    except (ValueError, OverflowError) as error:
        # From genops: an unknown opcode, or an argument that is cut short or malformed.
        raise FormatError(
            f"{path}: after offset {offset}: not a readable pickle; {str(error)[:200]}"
        ) from None
    raise FormatError(f"{path}: the pickle ends without its last opcode: truncated?")


class _Mark:
    """What the MARK opcode leaves on the stack."""


class _Machine:
    """The stack and the memo of the pickle language, without its calls."""

    def __init__(self, budget: Budget) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            # Larger ones would fail where they are printed or become floats.
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise RefusedError("integers must fit in 64 bits")
            self.stack.append(argument)
        elif name in _OPERATIONS:
            made = _OPERATIONS[name](self, argument)
            if made is not _NOTHING:
                self.stack.append(made)
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"the pickle uses the opcode {name}, which no model file needs")

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def top(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise RefusedError("the pickle takes more values than it has")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], _Mark):
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise RefusedError("the pickle goes back to a mark that it has not set")

    def extend(self, values: list[Any]) -> object:
        target = self.top()
        if not isinstance(target, list):
            raise RefusedError(f"the pickle appends to {describe(target)}")
        target.extend(values)
        return _NOTHING

    def update(self, flat: list[Any]) -> object:
        target = self.top()
        if not isinstance(target, dict):
            raise RefusedError(f"the pickle sets items of {describe(target)}")
        target.update(_pairs(flat))
        return _NOTHING

    def put(self, at: int | None) -> object:
        self.memo[len(self.memo) if at is None else at] = self.top()
        return _NOTHING

    def get(self, at: int) -> Any:
        if at not in self.memo:
            raise RefusedError(f"the pickle recalls memo {at}, which it has not stored")
        return self.memo[at]

    def stack_global(self) -> Global:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise RefusedError("the pickle names a global by something that is not text")
        return _allowed(f"{module}.{name}")

    def reduce(self) -> Any:
        arguments, target = self.pop(), self.pop()
        return construct(target, arguments, self.budget)

    def new_object(self) -> PickledCSR:
        arguments, kind = self.pop(), self.pop()
        if arguments != ():
            raise RefusedError(
                f"the pickle makes an object of {describe(kind)} with arguments, which is not allowed"
            )
        return new_csr(kind)

    def build(self) -> object:
        state, target = self.pop(), self.top()
        if not isinstance(target, (PickledArray, PickledCSR, PickledDType)):
            raise RefusedError(f"the pickle sets the state of {describe(target)}, which is not allowed")
        target.set_state(state, self.budget)
        return _NOTHING

    def discard(self, _: Any) -> object:
        return _NOTHING


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    if len(flat) % 2:
        raise RefusedError("the pickle gives a dict a key without a value")
    for key in flat[::2]:
        if not hashable(key):
            raise RefusedError(f"dict keys must be plain values; got {describe(key)}")
    return list(zip(flat[::2], flat[1::2], strict=True))


def _allowed(name: str) -> Global:
    if name not in ALLOWED:
        raise RefusedError(f"the pickle refers to {name[:200]!r}, which is not allowed")
    return Global(name)


_NOTHING = object()
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda m, _: None,
    "NEWTRUE": lambda m, _: True,
    "NEWFALSE": lambda m, _: False,
    "MARK": lambda m, _: _Mark(),
    "POP": lambda m, _: m.discard(m.stack.pop() if m.stack else m.top()),
    "POP_MARK": lambda m, _: m.discard(m.pop_to_mark()),
    "DUP": lambda m, _: m.top(),
    "EMPTY_TUPLE": lambda m, _: (),
    "TUPLE1": lambda m, _: (m.pop(),),
    "TUPLE2": lambda m, _: (m.pop(), m.pop())[::-1],
    "TUPLE3": lambda m, _: (m.pop(), m.pop(), m.pop())[::-1],
    "TUPLE": lambda m, _: tuple(m.pop_to_mark()),
    "EMPTY_LIST": lambda m, _: [],
    "EMPTY_SET": lambda m, _: [],
    "LIST": lambda m, _: m.pop_to_mark(),
    "FROZENSET": lambda m, _: m.pop_to_mark(),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: {},
    "DICT": lambda m, _: dict(_pairs(m.pop_to_mark())),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    "PUT": lambda m, at: m.put(at),
    "BINPUT": lambda m, at: m.put(at),
    "LONG_BINPUT": lambda m, at: m.put(at),
    "MEMOIZE": lambda m, _: m.put(None),
    "GET": lambda m, at: m.get(at),
    "BINGET": lambda m, at: m.get(at),
    "LONG_BINGET": lambda m, at: m.get(at),
    "GLOBAL": lambda m, name: _allowed(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(),
    "BUILD": lambda m, _: m.build(),
}
