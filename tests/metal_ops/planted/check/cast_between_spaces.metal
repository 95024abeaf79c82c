// says: a cast from one address space to another
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[32];
    device float* p = (device float*)&s[0];  // here
    y[i] = p[i];
}
