"""One small product with a known result, through every way that memory takes to a device."""

from __future__ import annotations

import numpy as np

from metal_ops._apple import Device
from metal_ops._buffers import COPY_BYTES
from metal_ops._errors import KernelError
from metal_ops._plans import Work
from metal_ops._submission import Memory

_ROWS = 8
_FILLER_GAP = 255


def check_device(device: Device) -> None:
    """Multiplies a small matrix by a vector too large to be copied, and compares exactly.

    The planes are wrapped once, the vector for this submission, and the rest is copied. All numbers are small
    integers, so that every order of additions gives the same bits.

    Raises:
        KernelError: saying what came out, if it is not the product.
    """
    columns = COPY_BYTES // 4 + 4097
    x = (np.arange(columns) % 7).astype(np.float32)
    y = np.full(_ROWS, np.nan, np.float32)
    values, deltas, row_pointers = [], [], [0]
    expected = np.zeros(_ROWS, np.float32)
    for row in range(_ROWS):
        at = row
        values.append(row - 3)
        deltas.append(row)
        while at + _FILLER_GAP < columns:
            at += _FILLER_GAP
            values.append(at % 5 - 2)
            deltas.append(_FILLER_GAP)
        used = np.arange(row, columns, _FILLER_GAP)
        entries = np.array(values[row_pointers[-1] :], np.float32)
        expected[row] = np.dot(entries, x[used])
        row_pointers.append(len(values))
    planes: dict[str, np.ndarray] = {
        "values": np.array(values, np.int8),
        "deltas": np.array(deltas, np.uint8),
        "row_pointers": np.array(row_pointers, np.uint32),
        "scales": np.ones(_ROWS, np.float32),
    }
    index = np.zeros(1, np.int32)
    memory = {name: device.resident(plane.tobytes()) for name, plane in planes.items()}
    memory |= {"x": _memory(x), "index": _memory(index), "y": Memory(y.ctypes.data, y.nbytes, written=True)}
    work = Work("product", _ROWS, columns, len(values))
    device.run(device.plan(work).launches(memory))
    if not np.array_equal(y, expected):
        raise KernelError(
            f"Metal: {device.name} gave {y.tolist()} where a product of integers is {expected.tolist()}; "
            "please report what `upg-jax doctor --metal` prints"
        )


def _memory(array: np.ndarray) -> Memory:
    return Memory(array.ctypes.data, array.nbytes)
