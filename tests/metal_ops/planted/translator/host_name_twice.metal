// says: host_name("k") is used twice
#include <metal_stdlib>
template <typename T>
[[kernel]] void f(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = T(1); }
template [[host_name("k")]] [[kernel]] decltype(f<float>) f<float>;
template [[host_name("k")]] [[kernel]] decltype(f<half>) f<half>;  // here
