// says: Metal has no lambdas
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    auto one = [] { return 1.0f; };  // here
    y[i] = one();
}
