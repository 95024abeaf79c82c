// Kernels that leave their memory: what the sanitizers say stands above each, the line is marked.
#include <metal_stdlib>
using namespace metal;

// says: heap-buffer-overflow
kernel void write_behind_a_buffer(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i + 1] = 1;  // here
}

// says: heap-buffer-overflow
kernel void read_behind_a_buffer(device float* y [[buffer(0)]], device const uchar* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    y[i] = x[i + 1];  // here
}

// says: heap-buffer-overflow
kernel void read_before_a_buffer(device float* y [[buffer(0)]], device const uchar* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    y[i] = x[int(i) - 1];  // here
}

// says: misaligned
kernel void misaligned_vector(device float* y [[buffer(0)]], device const uchar* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    y[i] = (*(device const uint4*)(x + 4)).y;  // here
}

// says: heap-buffer-overflow
kernel void behind_threadgroup_memory(device float* y [[buffer(0)]], threadgroup float* s [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
    s[i + 1] = 1;  // here
    y[i] = 1;
}

// says: index 64 out of bounds
kernel void behind_an_array(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[64];
    s[i + 1] = 1;  // here
    y[i] = 1;
}

// says: index 4 out of bounds
kernel void behind_a_local_array(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    float local[4];
    for (uint n = 0; n < 5 + i; ++n) local[n] = i;  // here
    y[i] = local[i % 4];
}

// says: shift exponent
kernel void shift_too_far(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i] = 1u << (i + 1);  // here
}
