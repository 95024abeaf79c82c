// says: kernel k: tile: [[buffer]] does not fit address space threadgroup
#include <metal_stdlib>
kernel void k(threadgroup float* tile [[buffer(0)]], uint i [[thread_position_in_grid]]) { tile[i] = 1; }  // here
