// says: p: a pointer or reference needs device, constant, threadgroup or thread
#include <metal_stdlib>
typedef float* Pointer;
kernel void k(device float* y [[buffer(0)]]) {
    float a = 1.0f;
    Pointer p = &a;  // here
    y[0] = *p;
}
