// says: read-only variable is not assignable
#include <metal_stdlib>
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    x[i] = 1;  // here
    y[i] = 1;
}
