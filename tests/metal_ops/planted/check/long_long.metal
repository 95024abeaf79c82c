// says: Metal has no long long
#include <metal_stdlib>
kernel void k(device uint* y [[buffer(0)]]) {
    unsigned long long n = y[0];  // here
    y[0] = uint(n);
}
