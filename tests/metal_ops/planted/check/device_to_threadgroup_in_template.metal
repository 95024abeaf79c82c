// says: no matching function for call to 'first'
#include <metal_stdlib>
template <typename T>
static inline T first(threadgroup const T* x) { return x[0]; }
template <typename T>
[[kernel]] void k(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i] = first(y);  // here
}
template [[host_name("k_float")]] [[kernel]] decltype(k<float>) k<float>;
