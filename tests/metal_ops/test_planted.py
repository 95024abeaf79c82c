"""Every checker finds the mistakes that were planted for it, and says where."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import metal_ops

PLANTED = Path(__file__).parent / "planted"


def planted(folder: str) -> list:
    return [pytest.param(path, id=path.stem) for path in sorted((PLANTED / folder).glob("*.metal"))]


def kernels(name: str) -> list:
    """Host names, what must be said, and the marked line of every kernel in a file."""
    lines = (PLANTED / name).read_text(encoding="utf-8").splitlines()
    found: list = []
    for number, line in enumerate(lines, 1):
        if line.startswith("// says: "):
            found.append([None, line.removeprefix("// says: "), None])
        elif line.startswith("kernel void "):
            found[-1][0] = re.match(r"kernel void (\w+)", line)[1]
        elif line.endswith("// here"):
            found[-1][2] = number
    return [pytest.param(*entry, id=entry[0]) for entry in found]


def expectation(path: Path) -> tuple[str, int]:
    lines = path.read_text(encoding="utf-8").splitlines()
    (here,) = (number for number, line in enumerate(lines, 1) if line.endswith("// here"))
    return lines[0].removeprefix("// says: "), here


@pytest.mark.parametrize("path", planted("translator"))
def test_the_translator_refuses(path):
    says, line = expectation(path)
    with pytest.raises(metal_ops.SourceError) as error:
        metal_ops.translate(metal_ops.load_source(path))
    assert f"{path.name}:{line}: " in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("path", planted("translator"))
def test_the_check_reports_what_the_translator_refuses(path):
    says, line = expectation(path)
    (problem,) = metal_ops.check(metal_ops.load_source(path))
    assert (problem.file, problem.line) == (path.name, line)
    assert says in problem.rule


@pytest.mark.parametrize("path", planted("check"))
def test_the_check_finds(path):
    pytest.importorskip("clang.cindex", reason='needs libclang: pip install "upg-jax[metal-dev]"')
    says, line = expectation(path)
    source = metal_ops.load_source(path)
    metal_ops.translate(source)  # which sees nothing wrong
    assert [(p.file, p.line) for p in metal_ops.check(source) if says in p.rule] == [(path.name, line)]
    assert {p.line for p in metal_ops.check(source)} == {line}


def run(name: str, kernel: str, size: int = 64, groups: int = 1, **settings) -> np.ndarray:
    program = metal_ops.Emulator(**settings).compile(metal_ops.load_source(PLANTED / name))
    y = np.full(size, np.nan, np.float32)
    signature = program.signatures[kernel]
    buffers = {0: y, 1: np.zeros(64, np.uint8)}
    program.dispatch(
        kernel,
        {i: buffers[i] for i in signature.buffers()},
        threadgroups=(groups, 1, 1),
        threads_per_threadgroup=(64, 1, 1),
        threadgroup_memory=dict.fromkeys(signature.threadgroup_memory(), 256),
    )
    return y


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("kernel", "says", "line"), kernels("running.metal"))
def test_the_emulator_stops(kernel, says, line, order):
    with pytest.raises(metal_ops.KernelError) as error:
        run("running.metal", kernel, order=order)
    assert str(error.value).startswith(f"{kernel}: threadgroup (0, 0, 0): ")
    assert says in str(error.value)
    if line:
        text = (PLANTED / "running.metal").read_text(encoding="utf-8")
        begin = text.count("\n", 0, text.index(f"kernel void {kernel}(")) + 1
        places = [int(n) for n in re.findall(r"running\.metal:(\d+)", str(error.value))]
        # Which of two places is met first depends on the order; the marked one is met last.
        assert all(begin < n <= line for n in places)
        assert places


@pytest.mark.parametrize(
    ("kernel", "groups"),
    [
        ("missing_barrier", 1),
        ("missing_simdgroup_barrier", 1),
        ("everyone_writes", 1),
        ("threadgroups_in_order", 3),
    ],
)
def test_the_orders_of_lanes_tell_a_race(kernel, groups):
    forward, reverse = (run("races.metal", kernel, 65, groups, order=o) for o in ("forward", "reverse"))
    assert not np.array_equal(forward[:64], reverse[:64])


def test_poison_tells_memory_that_was_never_written():
    y = run("races.metal", "never_initialized")
    assert np.isnan(y).tolist() == [i == 7 for i in range(64)]


def test_a_correct_kernel_gives_the_same_in_both_orders():
    forward, reverse = (run("races.metal", "correct", order=o) for o in ("forward", "reverse"))
    np.testing.assert_array_equal(forward, (np.arange(64) + 1) % 64)
    np.testing.assert_array_equal(forward, reverse)


@pytest.mark.parametrize(("kernel", "says", "line"), kernels("outside.metal"))
def test_the_sanitizers_find(kernel, says, line):
    with pytest.raises(metal_ops.KernelError) as error:
        run("outside.metal", kernel, sanitize="address,undefined")
    assert str(error.value).startswith(f"{kernel}: ")
    assert says in str(error.value)
    assert f"(outside.metal:{line})" in str(error.value)
