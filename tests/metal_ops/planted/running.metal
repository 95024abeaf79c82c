// Kernels that break a rule when they run: what the emulator says stands above each, the line is marked.
#include <metal_stdlib>
using namespace metal;

// says: while others wait in simd_
kernel void different_operations(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_position_in_grid]]) {
    float v = 1;
    if (lane < 16) {
        v = simd_sum(v);
    } else {
        v = simd_max(v);  // here
    }
    y[i] = v;
}

// says: while others wait in simd_sum at running.metal
kernel void same_operation_elsewhere(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_position_in_grid]]) {
    float v = 1;
    if (lane < 16) {
        v = simd_sum(v);
    } else {
        v = simd_sum(v);  // here
    }
    y[i] = v;
}

// says: returned
kernel void return_before_operation(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_position_in_grid]]) {
    if (lane == 5) return;
    y[i] = simd_sum(1.0f);  // here
}

// says: returned
kernel void loops_of_different_length(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_position_in_grid]]) {
    float v = 0;
    for (uint n = 0; n <= lane; ++n) v += simd_sum(1.0f);  // here
    y[i] = v;
}

// says: is not reached by every thread
kernel void barrier_in_a_branch(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    if (i < 40) threadgroup_barrier(mem_flags::mem_threadgroup);  // here
    y[i] = 1;
}

// says: is not reached by every thread
kernel void return_before_barrier(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    if (i >= 60) return;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // here
    y[i] = 1;
}

// says: while others wait in threadgroup_barrier
kernel void two_barriers(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    if (i < 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // here
    }
    y[i] = 1;
}

// says: while others wait in
kernel void operation_against_barrier(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_position_in_grid]]) {
    if (lane < 4) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        y[i] = simd_sum(1.0f);  // here
    }
}

// says: reads lane 40, which does not exist
kernel void lane_beyond_the_simdgroup(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i] = simd_shuffle(float(i), ushort(40));  // here
}

// says: 36864 bytes of threadgroup memory; at most 32768 are allowed
kernel void too_much_threadgroup_memory(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float a[4096];
    threadgroup float b[5120];
    a[i] = 1;
    b[i] = 1;
    y[i] = a[i] + b[i];
}
