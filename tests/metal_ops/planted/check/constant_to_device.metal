// says: cannot initialize a variable of type 'device Size *'
#include <metal_stdlib>
struct Size { uint n; };
kernel void k(device float* y [[buffer(0)]], constant Size& size [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    device Size* p = &size;  // here
    y[i] = p->n;
}
