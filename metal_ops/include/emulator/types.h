// Metal's types: scalars, and vectors with their sizes and alignments (three elements take the room of four).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

using uint = unsigned;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using half = _Float16;

namespace msl {

template <class T> struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
  Vector2() = default;
  constexpr Vector2(T a, T b) : x(a), y(b) {}
  explicit constexpr Vector2(T a) : x(a), y(a) {}
  T& operator[](size_t i) { return (&x)[i]; }
  T operator[](size_t i) const { return (&x)[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) Vector3 {
  T x, y, z;
  Vector3() = default;
  constexpr Vector3(T a, T b, T c) : x(a), y(b), z(c) {}
  explicit constexpr Vector3(T a) : x(a), y(a), z(a) {}
  T& operator[](size_t i) { return (&x)[i]; }
  T operator[](size_t i) const { return (&x)[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
  Vector4() = default;
  constexpr Vector4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  explicit constexpr Vector4(T a) : x(a), y(a), z(a), w(a) {}
  T& operator[](size_t i) { return (&x)[i]; }
  T operator[](size_t i) const { return (&x)[i]; }
};

#define MSL_OPERATOR(op)                                                                                              \
  template <class T> inline Vector2<T> operator op(Vector2<T> a, Vector2<T> b) {                                      \
    return {T(a.x op b.x), T(a.y op b.y)};                                                                            \
  }                                                                                                                   \
  template <class T> inline Vector3<T> operator op(Vector3<T> a, Vector3<T> b) {                                      \
    return {T(a.x op b.x), T(a.y op b.y), T(a.z op b.z)};                                                             \
  }                                                                                                                   \
  template <class T> inline Vector4<T> operator op(Vector4<T> a, Vector4<T> b) {                                      \
    return {T(a.x op b.x), T(a.y op b.y), T(a.z op b.z), T(a.w op b.w)};                                              \
  }
MSL_OPERATOR(+)
MSL_OPERATOR(-)
MSL_OPERATOR(*)
MSL_OPERATOR(/)
#undef MSL_OPERATOR

}  // namespace msl

#define MSL_VECTORS(name)            \
  using name##2 = msl::Vector2<name>; \
  using name##3 = msl::Vector3<name>; \
  using name##4 = msl::Vector4<name>;
MSL_VECTORS(uint)
MSL_VECTORS(ushort)
MSL_VECTORS(uchar)
MSL_VECTORS(int)
MSL_VECTORS(short)
MSL_VECTORS(char)
MSL_VECTORS(float)
MSL_VECTORS(half)
#undef MSL_VECTORS

template <class To, class From> inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
