// AVX-512 (F, BW, DQ, VL) for the wide operations; what takes eight entries at a time is AVX2's.
#pragma once

#include "simd_avx2.h"

namespace upg {
namespace {

struct Avx512 : Avx2 {
  static constexpr const char* kName = "avx512";

  using Wide = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kUnits = 4;
  static Wide wide_zero() { return _mm512_setzero_ps(); }
  static Wide wide_load(const float* p) { return _mm512_loadu_ps(p); }
  static void wide_store(float* p, Wide v) { _mm512_storeu_ps(p, v); }
  static Wide wide_broadcast(float x) { return _mm512_set1_ps(x); }
  static Wide wide_add(Wide a, Wide b) { return _mm512_add_ps(a, b); }
  static Wide wide_multiply(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
  static Wide wide_multiply_add(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace upg
