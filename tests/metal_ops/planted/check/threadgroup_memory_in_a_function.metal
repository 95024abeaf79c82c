// says: staged: threadgroup memory is declared in kernels only
#include <metal_stdlib>
static uint helper(uint v) {
    threadgroup uint staged[4];  // here
    staged[0] = v;
    return staged[0];
}
kernel void k(device uint* y [[buffer(0)]]) {
    threadgroup uint allowed[4];
    allowed[0] = 1;
    y[0] = helper(allowed[0]);
}
