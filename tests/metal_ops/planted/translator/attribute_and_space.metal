// says: kernel k: y: [[threadgroup]] does not fit address space device
#include <metal_stdlib>
kernel void k(device float* y [[threadgroup(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }  // here
