// says: host_name("k_float"): missing is no kernel template of this source
#include <metal_stdlib>
template <typename T>
[[kernel]] void k(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = T(1); }
template [[host_name("k_float")]] [[kernel]] decltype(missing<float>) missing<float>;  // here
