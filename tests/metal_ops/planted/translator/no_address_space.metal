// says: write device, constant or threadgroup, a type, * or &, a name
#include <metal_stdlib>
kernel void k(device const float* x [[buffer(0)]],
              float* y [[buffer(1)]],  // here
              uint i [[thread_position_in_grid]]) {
    y[i] = x[i];
}
