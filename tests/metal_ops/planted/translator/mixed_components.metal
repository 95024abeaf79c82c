// says: thread_position_in_grid and threads_per_grid must have the same number of components
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]],  // here
              uint i [[thread_position_in_grid]], uint3 n [[threads_per_grid]]) {
    y[i] = n.x;
}
