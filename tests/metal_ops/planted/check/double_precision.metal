// says: Metal has no double
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    double sum = 1;  // here
    y[i] = float(sum);
}
