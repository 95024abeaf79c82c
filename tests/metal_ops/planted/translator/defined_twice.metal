// says: kernel k is defined twice
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }
kernel void k(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }  // here
