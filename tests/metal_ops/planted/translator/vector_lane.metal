// says: kernel k: [[thread_index_in_simdgroup]] is one number; got uint3
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint3 i [[thread_index_in_simdgroup]]) { y[i.x] = 1; }  // here
