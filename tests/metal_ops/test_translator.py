"""Signatures as hosts need them, and every kernel of this package as it should be."""

from __future__ import annotations

import pytest
from helpers import metal

import metal_ops

KERNELS = (*metal.PRODUCTS, "dense_sparse", "mdcsr_decode")
ELEMENTS = {"float32": "float", "float16": "half", "bfloat16": "ushort"}
# What every kernel that has the argument calls it, by index.
TABLE = {
    1: ("values", "int8_t"),
    2: ("deltas", "uchar"),
    3: ("prime_table", "ushort"),
    4: ("prime_indices", "ushort"),
    5: ("scales", "float"),
    6: ("row_pointers", "uint"),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_takes_its_buffers_where_the_others_do(kernel):
    signatures = metal_ops.translate(metal_ops.load_source(kernel)).signatures
    signatures.pop("dense_sparse_sum", None)
    dtypes = [""] if kernel == "mdcsr_decode" else [f"_{d}" for d in metal.DTYPES]
    assert set(signatures) == {f"{kernel}_{m}{d}" for m in metal.MANIFOLDS for d in dtypes}
    for name, signature in signatures.items():
        buffers = signature.buffers()
        assert {i: (buffers[i].name, buffers[i].element) for i in TABLE} == TABLE
        assert all((a.access == "read_write") == (i == 9) for i, a in buffers.items())
        assert buffers[9].element == "float"
        assert (buffers[10].element, buffers[10].space, buffers[10].reference) == (
            "Parameters",
            "constant",
            True,
        )
        if kernel != "mdcsr_decode":
            assert buffers[0].element == ELEMENTS[name.rsplit("_", 1)[1]]
            assert (buffers[7].name, buffers[7].element) == ("index", "int")
        assert all(a.space == "device" for i, a in buffers.items() if i != 10)
        staged = [(a.index, a.element) for a in signature.threadgroup_memory().values()]
        assert staged == ([(0, "float")] if kernel in ("sparse_matvec_shared", "mdcsr_decode") else [])


def test_a_signature_lists_everything_in_order(tmp_path):
    path = tmp_path / "k.metal"
    path.write_text(
        """#include <metal_stdlib>
        /* a comment with [[unknown]] and kernel void not_me(float x) { */
        struct P { uint n; };
        template <typename T, uint n>
        [[kernel]] void scale(const device T* x [[buffer(3)]], threadgroup half* s [[ threadgroup( 1 ) ]],
                              uint3 at [[thread_position_in_grid]], device T& y [[buffer(0)]],
                              constant const P& p [[buffer(7)]], ushort lane [[thread_index_in_simdgroup]]) {}
        template [[host_name("scale_half_4")]] [[kernel]] decltype(scale<half, 4>) scale<half, 4>;
        kernel void plain(device float *y [[buffer(2)]]) {}
        """
    )
    signatures = metal_ops.translate(metal_ops.load_source(path)).signatures
    assert set(signatures) == {"scale_half_4", "plain"}
    scale = signatures["scale_half_4"]
    assert scale.function == "scale<half, 4>"
    assert scale.arguments == (
        metal_ops.Argument("x", 3, "device", "half", "read", False),
        metal_ops.Argument("s", 1, "threadgroup", "half", "read_write", False),
        metal_ops.Argument("y", 0, "device", "half", "read_write", True),
        metal_ops.Argument("p", 7, "constant", "P", "read", True),
    )
    assert scale.thread_attributes == ("thread_position_in_grid", "thread_index_in_simdgroup")
    assert scale.parameters[2] == ("uint3", "thread_position_in_grid")


def test_a_source_without_kernels_is_refused(tmp_path):
    path = tmp_path / "empty.metal"
    path.write_text("#include <metal_stdlib>\n")
    with pytest.raises(metal_ops.SourceError, match="no kernel that a host can call"):
        metal_ops.translate(metal_ops.load_source(path))


@pytest.mark.parametrize("kernel", metal.KERNELS)
def test_the_check_finds_nothing_in_the_kernels(kernel):
    pytest.importorskip("clang.cindex", reason='needs libclang: pip install "upg-jax[metal-dev]"')
    for entries in (4, 8, 16):
        assert metal_ops.check(metal_ops.load_source(kernel, {"LANE_ENTRIES": entries})) == []


def test_what_only_cuda_sees_is_not_checked(tmp_path):
    path = tmp_path / "k.metal"
    path.write_text(
        """#include <metal_stdlib>
        #ifdef __CUDACC__
        static inline uint one() { uint v; asm("mov.u32 %0, 1;" : "=r"(v)); return v; }
        #else
        static inline uint one() { return 1; }
        #endif
        kernel void k(device uint* y [[buffer(0)]]) { y[0] = one(); }
        """
    )
    pytest.importorskip("clang.cindex", reason='needs libclang: pip install "upg-jax[metal-dev]"')
    assert metal_ops.check(metal_ops.load_source(path)) == []
    path.write_text(path.read_text().replace("#ifdef __CUDACC__", "#ifndef OTHER"))
    assert "Metal has no asm" in str(metal_ops.check(metal_ops.load_source(path)))
