// says: v: a pointer or reference needs device, constant, threadgroup or thread
#include <metal_stdlib>
static inline void helper(float& v) { v = 1; }  // here
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    float v;
    helper(v);
    y[i] = v;
}
