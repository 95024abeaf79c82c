// says: cannot initialize a variable of type 'device float *'
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[32];
    device float* p = s;  // here
    y[i] = p[i];
}
