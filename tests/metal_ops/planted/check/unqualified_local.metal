// says: p: a pointer or reference needs device, constant, threadgroup or thread
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    float v = 1;
    float* p = &v;  // here
    y[i] = *p;
}
