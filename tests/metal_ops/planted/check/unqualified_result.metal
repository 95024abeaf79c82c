// says: next: the pointer or reference that it returns needs an address space
#include <metal_stdlib>
static device float* allowed(device float* y) { return y; }
static float* next(thread float* y) {  // here
    return y + 1;
}
kernel void k(device float* y [[buffer(0)]]) {
    float a[2] = {1.0f, 2.0f};
    *allowed(y) = *next(a);
}
