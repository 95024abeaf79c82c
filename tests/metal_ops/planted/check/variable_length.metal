// says: a: the length of an array must be a constant
#include <metal_stdlib>
kernel void k(device uint* y [[buffer(0)]], constant uint& n [[buffer(1)]]) {
    uint a[n];  // here
    a[0] = 1;
    y[0] = a[0];
}
