// says: N: a variable at program scope needs the address space constant
#include <metal_stdlib>
constant uint allowed = 3;
constexpr uint N = 4;  // here
kernel void k(device uint* y [[buffer(0)]]) { y[0] = N + allowed; }
