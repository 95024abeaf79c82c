// Kernels that nothing stops, with results that depend on chance: the two orders of lanes differ, or poison shows.
#include <metal_stdlib>
using namespace metal;

kernel void missing_barrier(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[64];
    s[i] = i;
    y[i] = s[(i + 1) % 64];
}

kernel void missing_simdgroup_barrier(device float* y [[buffer(0)]], threadgroup float* s [[threadgroup(0)]],
                                      uint i [[thread_position_in_grid]]) {
    s[i] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    s[i] += s[i ^ 1];
    y[i] = s[i];
}

kernel void everyone_writes(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[0] = i;
    y[i + 1] = 0;
}

kernel void threadgroups_in_order(device float* y [[buffer(0)]], uint group [[threadgroup_position_in_grid]],
                                  uint lane [[thread_index_in_threadgroup]]) {
    if (lane == 0) y[0] = y[0] * 2 + group;
    y[lane + 1] = 0;
}

kernel void never_initialized(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[64];
    if (i != 7) s[i] = 1;
    y[i] = s[i];
}

kernel void correct(device float* y [[buffer(0)]], threadgroup float* s [[threadgroup(0)]],
                    uint i [[thread_position_in_grid]]) {
    s[i] = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[(i + 1) % 64];
}
