// says: kernel k: i must be uint, ushort or a vector of them; got int
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], int i [[thread_position_in_grid]]) { y[i] = 1; }  // here
