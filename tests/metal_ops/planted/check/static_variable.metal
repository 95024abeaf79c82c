// says: calls: a variable that is static needs the address space constant
#include <metal_stdlib>
kernel void k(device uint* y [[buffer(0)]]) {
    static uint calls = 0;  // here
    y[0] = ++calls;
}
