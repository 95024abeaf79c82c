// says: use of undeclared identifier 'simd_total'
#include <metal_stdlib>
using namespace metal;
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i] = simd_total(1.0f);  // here
}
