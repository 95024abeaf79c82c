// says: kernel k: parameter without an attribute: uint i
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]], uint i) { y[i] = 1; }  // here
