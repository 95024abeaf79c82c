// says: kernel k: y: index must be 0 to 30; got 31
#include <metal_stdlib>
kernel void k(device float* y [[buffer(31)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }  // here
