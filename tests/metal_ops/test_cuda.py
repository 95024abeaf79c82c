"""The same sources compile for NVIDIA GPUs; benchmarks/nvidia_metal_kernels.py runs them on one."""

from __future__ import annotations

import pytest
from helpers import metal

import metal_ops


@pytest.fixture(autouse=True)
def nvrtc():
    try:
        metal_ops.nvrtc_version()
    except metal_ops.UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
@pytest.mark.parametrize("kernel", metal.KERNELS)
def test_every_kernel_compiles(kernel, architecture):
    source = metal_ops.load_source(kernel)
    cubin = metal_ops.compile_cuda(source, architecture)
    assert cubin.startswith(b"\x7fELF")
    for name in metal_ops.translate(source).signatures:
        assert f".text.{name}\0".encode() in cubin


@pytest.mark.slow
@pytest.mark.parametrize("entries", [4, 16])
def test_other_numbers_of_entries_per_lane_compile(entries):
    for kernel in (*metal.PRODUCTS[1:], "dense_sparse", "mdcsr_decode"):
        metal_ops.compile_cuda(metal_ops.load_source(kernel, {"LANE_ENTRIES": entries}), "sm_90")


def test_what_nvrtc_refuses_is_named_with_its_line(tmp_path):
    path = tmp_path / "k.metal"
    path.write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {\n  y[0] = missing;\n}\n"
    )
    with pytest.raises(metal_ops.SourceError, match=r"(?s)k: NVRTC refuses it for sm_90.*k\.metal\(3\)"):
        metal_ops.compile_cuda(metal_ops.load_source(path), "sm_90")
