// says: factorial: Metal has no recursion
#include <metal_stdlib>
static uint factorial(uint n) {
    return n == 0 ? 1 : n * factorial(n - 1);  // here
}
kernel void k(device uint* y [[buffer(0)]]) { y[0] = factorial(y[0]); }
