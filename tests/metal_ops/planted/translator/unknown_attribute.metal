// says: unknown attribute [[function_constant]]
#include <metal_stdlib>
using namespace metal;
constant bool fast [[function_constant(0)]];  // here
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = fast ? 1 : 2; }
