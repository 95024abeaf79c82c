// says: kernel k: x and y both have index 1
#include <metal_stdlib>
kernel void k(device const float* x [[buffer(1)]],  // here
              device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    y[i] = x[i];
}
