// says: unknown attribute [[thread_position_in_simdgroup]]
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]],
              uint i [[thread_position_in_simdgroup]]) {  // here
    y[i] = 1;
}
