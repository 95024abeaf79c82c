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

template <class To, class From> inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Not every compiler has a half. Conversions avoid subnormal floats, which the calling thread may flush to zero.
struct half {
  ushort bits;
  half() = default;
  half(float v) {
    const uint u = as_type<uint>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = static_cast<ushort>(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
      bits = static_cast<ushort>(sign | 0x7c00);
    } else if (magnitude >= 0x38800000) {  // the smallest normal half; rounds to nearest, ties to even
      bits = static_cast<ushort>(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
    } else {
      bits = static_cast<ushort>(sign | static_cast<uint>(__builtin_rintf(as_type<float>(magnitude) * 0x1p24f)));
    }
  }
  operator float() const {
    const uint sign = uint(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return as_type<float>(sign | 0x7f800000 | fraction << 13);
    if (exponent) return as_type<float>(sign | (exponent + 112) << 23 | fraction << 13);
    return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  }
};

namespace msl {

// Two halves make a half, as in Metal; a half and a float make a float, by the conversion above.
template <class T> struct Half {};
template <> struct Half<half> { using type = half; };

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

template <class T> inline typename msl::Half<T>::type operator+(T a, T b) { return float(a) + float(b); }
template <class T> inline typename msl::Half<T>::type operator-(T a, T b) { return float(a) - float(b); }
template <class T> inline typename msl::Half<T>::type operator*(T a, T b) { return float(a) * float(b); }
template <class T> inline typename msl::Half<T>::type operator/(T a, T b) { return float(a) / float(b); }

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
