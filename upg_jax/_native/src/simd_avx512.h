// AVX-512 (F, BW, DQ, VL) for the wide operations; what takes eight entries at a time is AVX2's.
#pragma once

#include "simd_avx2.h"

namespace upg {
namespace {

// Sixteen floats, with the operations that kernels of whole rows use.
struct Sixteen {
  using Eight = __m512;
  static Eight zero() { return _mm512_setzero_ps(); }
  static Eight load(const float* p) { return _mm512_loadu_ps(p); }
  // A load that the compiler does not repeat at each use.
  static Eight load_once(const float* p) {
    Eight v = load(p);
    asm("" : "+v"(v));
    return v;
  }
  static void store(float* p, Eight v) { _mm512_storeu_ps(p, v); }
  static Eight multiply(Eight a, Eight b) { return _mm512_mul_ps(a, b); }
  static Eight multiply_add(Eight a, Eight b, Eight c) { return _mm512_fmadd_ps(a, b, c); }
  static Eight add(Eight a, Eight b) { return _mm512_add_ps(a, b); }
  static Eight broadcast(float x) { return _mm512_set1_ps(x); }
  static float sum(Eight v) { return _mm512_reduce_add_ps(v); }
  UPG_INLINE static Eight from_int8(const std::int8_t* q) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
  }
};

struct Avx512 : Avx2 {
  static constexpr const char* kName = "avx512";

  using Run = Sixteen;
  static constexpr size_t kRun = 16;
  static constexpr size_t kSums = 16;

  // The columns of bits, the first of which stands for `first`; writes whole groups of eight.
  UPG_INLINE static size_t columns_of_bits(std::uint64_t bits, size_t first, std::uint32_t* columns) {
    const __m256i step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    size_t n = 0;
    for (size_t i = 0; i < 64; i += 8) {
      const auto eight = static_cast<__mmask8>(bits >> i);
      const __m256i all = _mm256_add_epi32(step, _mm256_set1_epi32(static_cast<int>(first + i)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + n), _mm256_maskz_compress_epi32(eight, all));
      n += static_cast<size_t>(__builtin_popcount(eight));
    }
    return n;
  }

  using Wide = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kUnits = 4;
  static constexpr size_t kBlockRows = 8;
  static constexpr size_t kBlockUnits = 2;
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
