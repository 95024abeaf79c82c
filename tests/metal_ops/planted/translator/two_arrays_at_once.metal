// says: write threadgroup memory as one array
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float a[4], b[4];  // here
    a[i] = 1;
    y[i] = a[i];
}
