// says: a number without f is a float in Metal and a double elsewhere
#include <metal_stdlib>
kernel void k(device float* y [[buffer(0)]]) {
    y[0] = y[1] * 0.1;  // here
}
