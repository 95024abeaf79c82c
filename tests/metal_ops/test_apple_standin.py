"""The stand-in refuses what Metal or PyObjC would refuse, or leave undefined; a planted mistake for each rule."""

from __future__ import annotations

import ast
import ctypes
import mmap
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metal_ops import _apple
from metal_ops._standin import MetalRuleError, StandIn, extract_selectors
from metal_ops._standin._open import _compile
from metal_ops._standin._selectors import CONSTANTS, FUNCTIONS, METHODS
from metal_ops._standin.extract_selectors import read_metadata, signature

TWICE = """#include <metal_stdlib>
using namespace metal;
kernel void twice(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& n [[buffer(2)]],
                  threadgroup float* staged [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
    if (i >= n) return;
    staged[i] = x[i];
    y[i] = 2 * staged[i];
}
"""


class Bench:
    """A device, a compiled kernel and a page of memory."""

    def __init__(self, **behaviour):
        self.metal = StandIn(_compile, **behaviour)
        self.device = self.metal.MTLCreateSystemDefaultDevice()
        self.pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
        self.numbers = np.frombuffer(self.pages, np.float32)
        self.numbers[:4] = [1, 2, 3, 4]

    def options(self):
        options = self.metal.MTLCompileOptions.alloc().init()
        options.setFastMathEnabled_(False)
        return options

    def library(self, text=TWICE):
        return self.device.newLibraryWithSource_options_error_(text, self.options(), None)

    def pipeline(self):
        function = self.library()[0].newFunctionWithName_("twice")
        return self.device.newComputePipelineStateWithFunction_error_(function, None)[0]

    def buffer(self, page=0, pages=1):
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) + page * mmap.PAGESIZE
        memory = (ctypes.c_char * (pages * mmap.PAGESIZE)).from_address(at)
        return self.device.newBufferWithBytesNoCopy_length_options_deallocator_(memory, len(memory), 0, None)

    def size(self, *size):
        return self.metal.MTLSizeMake(*size)


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def commands(bench):
    with bench.metal.autorelease_pool():
        yield bench.device.newCommandQueue().commandBuffer()


@pytest.fixture
def encoder(bench, commands):
    encoder = commands.computeCommandEncoder()
    encoder.setComputePipelineState_(bench.pipeline())
    encoder.setBuffer_offset_atIndex_(bench.buffer(0), 0, 0)
    encoder.setBuffer_offset_atIndex_(bench.buffer(1), 8, 1)
    encoder.setBytes_length_atIndex_(np.uint32(4).tobytes(), 4, 2)
    encoder.setThreadgroupMemoryLength_atIndex_(128, 0)
    return encoder


def dispatch(bench, encoder, groups=(1, 1, 1), threads=(32, 1, 1)):
    encoder.dispatchThreadgroups_threadsPerThreadgroup_(bench.size(*groups), bench.size(*threads))


def refused(rule):
    return pytest.raises(MetalRuleError, match=rule)


def test_a_launch_runs_when_it_is_waited_for(bench, commands, encoder):
    dispatch(bench, encoder)
    encoder.endEncoding()
    commands.commit()
    result = bench.numbers[mmap.PAGESIZE // 4 + 2 :][:4]
    np.testing.assert_array_equal(result, 0)
    commands.waitUntilCompleted()
    np.testing.assert_array_equal(result, [2, 4, 6, 8])
    assert commands.status() == CONSTANTS["MTLCommandBufferStatusCompleted"]
    assert commands.error() is None
    assert commands.GPUEndTime() > commands.GPUStartTime()


def test_methods_that_pyobjc_does_not_publish(bench):
    with pytest.raises(AttributeError, match="publishes no method 'newBufferWithLenght:options:'"):
        bench.device.newBufferWithLenght_options_(4, 0)
    with pytest.raises(AttributeError, match="Queue has no method 'commit'"):
        bench.device.newCommandQueue().commit()
    with pytest.raises(AttributeError, match="no 'MTLSizeMade'"):
        bench.metal.MTLSizeMade(1, 1, 1)


def test_numbers_and_types_of_arguments(bench, encoder):
    with refused("takes 3 arguments; got 2"):
        encoder.setBuffer_offset_atIndex_(bench.buffer(), 0)
    with refused("must be an unsigned integer; got -1"):
        encoder.setBuffer_offset_atIndex_(bench.buffer(), -1, 0)
    with refused("must be an unsigned integer; got 1.0"):
        bench.metal.MTLSizeMake(1.0, 1, 1)
    with refused("must be a MTLSize"):
        encoder.dispatchThreadgroups_threadsPerThreadgroup_((1, 1, 1), (32, 1, 1))
    with refused("must be a bool"):
        bench.metal.MTLCompileOptions.alloc().init().setFastMathEnabled_(0)
    with refused("an object with memory"):
        encoder.setBytes_length_atIndex_(4, 4, 2)
    with refused("None where an error comes back"):
        bench.device.newLibraryWithSource_options_error_(TWICE, bench.options(), [])


def test_a_source_that_does_not_compile_gives_an_error_and_no_library(bench):
    library, error = bench.library("kernel void f(device float* y [[bufer(0)]]) { }")
    assert library is None
    assert "bufer" in error.localizedDescription()
    assert bench.library()[0].newFunctionWithName_("thrice") is None


def test_the_compiler_must_keep_to_ieee(bench):
    with refused("IEEE"):
        bench.device.newLibraryWithSource_options_error_(
            TWICE, bench.metal.MTLCompileOptions.alloc().init(), None
        )


def test_pages(bench):
    begin = ctypes.addressof(ctypes.c_char.from_buffer(bench.pages))
    new = bench.device.newBufferWithBytesNoCopy_length_options_deallocator_
    for offset, length in ((64, mmap.PAGESIZE), (0, 100), (0, mmap.PAGESIZE + 64)):
        memory = (ctypes.c_char * length).from_address(begin + offset)
        with refused("whole pages"):
            new(memory, length, 0, None)
    with refused("must be writable"):
        new(bytes(mmap.PAGESIZE), mmap.PAGESIZE, 0, None)
    with refused("length must be the memory's"):
        new((ctypes.c_char * mmap.PAGESIZE).from_address(begin), 2 * mmap.PAGESIZE, 0, None)
    with refused("shared"):
        new((ctypes.c_char * mmap.PAGESIZE).from_address(begin), mmap.PAGESIZE, 2, None)
    assert Bench(no_copy=False).buffer() is None
    assert Bench(max_buffer_length=mmap.PAGESIZE).buffer(pages=2) is None


def test_what_is_bound(bench, encoder):
    with refused("index must be below 31"):
        encoder.setBuffer_offset_atIndex_(bench.buffer(), 0, 31)
    with refused("offset 4096 is outside"):
        encoder.setBuffer_offset_atIndex_(bench.buffer(), mmap.PAGESIZE, 0)
    with refused("not a buffer"):
        encoder.setBuffer_offset_atIndex_(None, 0, 0)
    with refused("1 to 4096 bytes; got 4097"):
        encoder.setBytes_length_atIndex_(bytes(4097), 4097, 2)
    with refused("length is 5, and the data has 4"):
        encoder.setBytes_length_atIndex_(bytes(4), 5, 2)
    with refused("multiple of 16; got 100"):
        encoder.setThreadgroupMemoryLength_atIndex_(100, 0)


def test_what_is_not_bound(bench, commands):
    encoder = commands.computeCommandEncoder()
    with refused("set a pipeline"):
        dispatch(bench, encoder)
    encoder.setComputePipelineState_(bench.pipeline())
    with refused(r"buffer\(0\) of twice is not set"):
        dispatch(bench, encoder)
    for index in (0, 1, 2):
        encoder.setBuffer_offset_atIndex_(bench.buffer(index), 0, index)
    with refused(r"threadgroup\(0\) of twice is not set"):
        dispatch(bench, encoder)


def test_sizes_of_grids_and_memory(bench, encoder):
    with refused("1 to 1024 threads"):
        dispatch(bench, encoder, threads=(32, 33, 1))
    with refused("1 to 1024 threads"):
        dispatch(bench, encoder, threads=(0, 1, 1))
    with refused("must have threadgroups"):
        dispatch(bench, encoder, groups=(1, 0, 1))
    encoder.setThreadgroupMemoryLength_atIndex_(32 * 1024 + 16, 0)
    with refused("at most 32 KiB"):
        dispatch(bench, encoder)
    small = Bench(max_threads=64)
    with small.metal.autorelease_pool():
        encoder = small.device.newCommandQueue().commandBuffer().computeCommandEncoder()
        encoder.setComputePipelineState_(small.pipeline())
        with refused("1 to 64 threads"):
            dispatch(small, encoder, threads=(96, 1, 1))


def test_two_buffers_over_one_page_in_a_dispatch(bench, encoder):
    encoder.setBuffer_offset_atIndex_(bench.buffer(0, pages=2), 0, 0)
    encoder.setBuffer_offset_atIndex_(bench.buffer(1, pages=2), 0, 1)
    with refused("share memory"):
        dispatch(bench, encoder)


def test_the_order_of_things(bench, commands, encoder):
    with refused("commit before"):
        commands.waitUntilCompleted()
    with refused("every encoder must have ended"):
        commands.commit()
    with refused("end the encoder before"):
        commands.computeCommandEncoder()
    encoder.endEncoding()
    with refused("has ended"):
        encoder.endEncoding()
    with refused("has ended"):
        dispatch(bench, encoder)
    commands.commit()
    with refused("committed once"):
        commands.commit()
    with refused("is committed"):
        commands.computeCommandEncoder()


def test_without_an_autorelease_pool(bench):
    queue = bench.device.newCommandQueue()
    with refused("no autorelease pool"):
        queue.commandBuffer()


def test_a_mistake_in_a_kernel_is_the_command_buffers_error(bench, commands):
    text = """#include <metal_stdlib>
using namespace metal;
kernel void divergent(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
    if (lane < 16) y[lane] = simd_sum(1.0f);
}
"""
    function = bench.library(text)[0].newFunctionWithName_("divergent")
    pipeline, _ = bench.device.newComputePipelineStateWithFunction_error_(function, None)
    encoder = commands.computeCommandEncoder()
    encoder.setComputePipelineState_(pipeline)
    encoder.setBuffer_offset_atIndex_(bench.buffer(), 0, 0)
    dispatch(bench, encoder)
    encoder.endEncoding()
    commands.commit()
    commands.waitUntilCompleted()
    assert commands.status() == CONSTANTS["MTLCommandBufferStatusError"]
    assert "divergent" in commands.error().localizedDescription()


def test_every_name_that_the_device_uses_is_in_the_table():
    """Read from the code, so that a path which no test takes is covered, too."""
    tree = ast.parse(Path(_apple.__file__).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    selectors = {name for name in used if re.fullmatch(r"[a-z][A-Za-z]+(_[A-Za-z]+)*_", name)}
    assert len(selectors) >= 10
    assert {name.replace("_", ":") for name in selectors} <= set(METHODS)
    assert {name for name in used if name.startswith("MTL")} <= {*CONSTANTS, *FUNCTIONS, "MTLCompileOptions"}


def test_extracting_the_table_from_a_wheel(tmp_path):
    """A wheel of the same make; PyObjC's own is not downloaded here."""
    wheel = tmp_path / "metal.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "Metal/_metadata.py",
            "import objc\n"
            'enums = "$MTLMathModeSafe@0$MTLOther@-3$"\n'
            'functions = {"MTLSizeMake": (b"",)}\n'
            "r = objc.registerMetaDataForSelector\n"
            'r(b"Other", b"commit", {"retval": {"type": b"Z"}})\n'
            'r(b"NSObject", b"commit", {"retval": {"type": b"v"}})\n'
            'r(b"NSObject", b"make:error:", {"arguments": {3: {"type": b"^@", "type_modifier": b"o"}}})\n'
            'r(b"C", b"setFast:", {"arguments": {2: {"type": objc._C_NSBOOL}}})\n',
        )
    methods, constants, functions = read_metadata(wheel)
    assert signature("commit", methods["commit"]) == ("v",)
    assert signature("make:error:", methods["make:error:"]) == ("@", "@", "o^@")
    assert signature("setFast:", methods["setFast:"]) == ("v", "Z")
    assert constants == {"MTLMathModeSafe": 0, "MTLOther": -3}
    assert list(functions) == ["MTLSizeMake"]


def test_the_table_is_what_the_script_writes():
    path = Path(extract_selectors.__file__).with_name("_selectors.py")
    text = path.read_text(encoding="utf-8")
    version = re.search(r"pyobjc-framework-Metal ([\d.]+);", text)[1]
    assert text == extract_selectors.table(version, METHODS, CONSTANTS)
    assert set(METHODS) == {*extract_selectors._METHODS, *extract_selectors._DOCUMENTED}
