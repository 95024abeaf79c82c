// says: x: a pointer or reference needs device, constant, threadgroup or thread
#include <metal_stdlib>
static inline float helper(const float* x) { return *x; }  // here
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    float v = 1;
    y[i] = helper(&v);
}
