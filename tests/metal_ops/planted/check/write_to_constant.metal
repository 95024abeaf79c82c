// says: cannot assign to
#include <metal_stdlib>
struct Size { uint n; };
kernel void k(device float* y [[buffer(0)]], constant Size& size [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    size.n = 3;  // here
    y[i] = 1;
}
