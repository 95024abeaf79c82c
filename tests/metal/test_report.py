"""`upg-jax doctor --metal` in the emulator: every kernel is compiled, checked and timed, and what fails is told."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from helpers import metal
from typer.testing import CliRunner

import metal_ops
from metal_ops._buffers import Buffers
from upg_jax import _metal_report
from upg_jax._metal_report import _fast, _layer, _right
from upg_jax._sparse_dense import unavailable_reason
from upg_jax.cli._app import app

pytestmark = pytest.mark.skipif(
    unavailable_reason("emulator") is not None, reason=f"emulator: {unavailable_reason('emulator')}"
)


@pytest.fixture(scope="module")
def lines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fast, "_REPEATS", 2)  # in the emulator times mean nothing
        return list(_metal_report.report())


def of(lines, section):
    return [line for line in lines if line.section == section]


def test_everything_is_tried_and_works(lines):
    assert [line for line in lines if not line.ok] == []
    assert len(of(lines, "compiles")) == 6
    compiled = sum(int(line.found.split()[0]) for line in of(lines, "compiles"))
    signatures = [
        metal_ops.translate(metal_ops.load_source(line.name)).signatures for line in of(lines, "compiles")
    ]
    assert compiled == sum(map(len, signatures))
    # Four products and the transposed one in three dtypes, and decoding, on both manifolds; and the self-check.
    assert len(of(lines, "right")) == 2 * (4 * 3 + 3 + 1) + 1
    assert [line.found for line in of(lines, "memory")] == ["read in place"] * 2
    assert len(of(lines, "jax")) == 3
    assert len(of(lines, "fast")) == 2 + 2 * 2 * 6


def test_every_kernel_that_metal_is_asked_for_is_in_it():
    names = set(metal.KERNELS)
    for_nvidia = {"mdcsr_levels", "sparse_matvec_stream"}
    assert names - for_nvidia == set(_right.SOURCES)


def test_times_have_units_and_shares(lines):
    timed = [line.found for line in of(lines, "fast")[2:]]
    assert all(
        re.fullmatch(r"\d+ us on the GPU, \d+ us in all, \d+% of the memory's speed", t) for t in timed
    )


def test_the_block_to_paste(lines):
    text = _metal_report.as_text(lines)
    assert text.startswith("```text\n[machine]\n")
    assert text.endswith(f"all {len(lines)} ok\n```")
    failed = [*lines, _metal_report.Line("fast", "one more", False, "KernelError: no")]
    assert f"1 of {len(failed)} failed" in _metal_report.as_text(failed)
    assert re.search(r"FAIL one more +KernelError: no", _metal_report.as_text(failed))


def test_a_wrong_kernel_fails_its_lines_and_no_others(monkeypatch):
    run = metal_ops.Device.run

    def wrong_batches(self, launches):
        seconds = run(self, launches)
        if launches[0].kernel == "sparse_matvec_batch_prime_float16":
            y = launches[0].buffers[9]
            np.frombuffer(memory_of(y), np.float32)[-1] += 1
        return seconds

    monkeypatch.setattr(metal_ops.Device, "run", wrong_batches)
    device = metal_ops.open_emulated_device()
    failed = [line for line in _right.checking(device, set(_right.SOURCES)) if not line.ok]
    assert [line.name for line in failed] == ["sparse_matvec_batch prime float16"]
    assert re.search(r"AssertionError: [\d.e+]+ times the bound", failed[0].found)


def memory_of(memory):
    import ctypes

    return (ctypes.c_char * memory.nbytes).from_address(memory.address)


def test_a_kernel_that_does_not_compile_keeps_no_other_from_being_tried(monkeypatch):
    library = metal_ops.Device._library

    def refuse(self, source):
        if source.name == "dense_sparse":
            raise metal_ops.KernelError("Metal: dense_sparse does not compile: no such thing")
        return library(self, source)

    monkeypatch.setattr(metal_ops.Device, "_library", refuse)
    device = metal_ops.open_emulated_device()
    (failed,) = [line for line in _right.compiling(device) if not line.ok]
    assert failed.found == "KernelError: Metal: dense_sparse does not compile: no such thing"
    compiled = set(_right.SOURCES) - {failed.name}
    right, fast = list(_right.checking(device, compiled)), list(_fast.timing(device, compiled, emulated=True))
    assert [line for line in (*right, *fast) if not line.ok or "dense_sparse" in line.name] == []
    assert len(right) == 2 * (4 * 3 + 1) + 1
    assert len(fast) == 2 + 2 * 2 * 5


def test_memory_that_must_be_copied_is_told(monkeypatch):
    """As where Metal refuses both, and gives buffers over memory of our own only."""
    monkeypatch.setattr(Buffers, "_in_region", lambda self, memory: None)
    monkeypatch.setattr(Buffers, "_wrap", lambda self, memories, bound: memories)
    lines = list(_fast.memory(metal_ops.open_emulated_device()))
    assert [line.ok for line in lines] == [False, False]
    assert all("right, but copied" in line.found for line in lines)


def test_caches_are_avoided_by_copies_in_turns(monkeypatch):
    device = metal_ops.open_emulated_device()
    layer = _layer.Layer(device, (64, 256), 0.5, "prime", beyond=100_000)
    assert len(layer._copies) * layer.nbytes >= 100_000
    plan, (x, y) = (
        layer.plan(device, "sparse_matvec", 1, "float32"),
        layer.arrays("sparse_matvec", 1, "float32"),
    )
    found = []
    for copy in range(len(layer._copies)):
        layer.run(device, plan, x, y, copy)
        found.append(y.copy())
    assert len({memory["values"].address for memory in layer._copies}) == len(found) > 1
    np.testing.assert_array_equal(found, np.broadcast_to(found[0], (len(found), 1, 64)))


def test_without_a_device_it_says_so(monkeypatch):
    def nothing():
        raise metal_ops.UnavailableError("Metal: this process has no GPU")

    monkeypatch.setattr(metal_ops, "open_emulated_device", nothing)
    assert list(_metal_report.report())[-1] == _metal_report.Line(
        "device", "opening", False, "UnavailableError: Metal: this process has no GPU"
    )


def test_the_command_prints_it_and_tells_failure_by_its_exit_code(monkeypatch):
    few = [_metal_report.Line("machine", "runs on", True, "paper")]
    monkeypatch.setattr(_metal_report, "report", lambda: iter(few))
    result = CliRunner().invoke(app, ["doctor", "--metal"])
    assert result.exit_code == 0
    assert "runs on  paper" in result.output
    assert json.loads(CliRunner().invoke(app, ["doctor", "--metal", "--json"]).output)[0]["found"] == "paper"
    few.append(_metal_report.Line("device", "opening", False, "no GPU"))
    assert CliRunner().invoke(app, ["doctor", "--metal"]).exit_code == 1
