// says: values: a pointer or reference needs device, constant, threadgroup or thread
#include <metal_stdlib>
struct Row {
    const float* values;  // here
};
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = sizeof(Row); }
