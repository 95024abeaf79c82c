// says: no matching function for call to 'helper'
#include <metal_stdlib>
static inline float helper(thread const float* x, uint i) { return x[i]; }
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    y[i] = helper(x, i);  // here
}
