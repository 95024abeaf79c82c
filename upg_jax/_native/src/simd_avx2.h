// The vector operations with AVX2, FMA and F16C; see simd_portable.h for what each one does.
#pragma once

#include <immintrin.h>

#include "expansion.h"
#include "primes.h"
#include "slabs.h"

namespace upg {
namespace {

struct Avx2 {
  static constexpr const char* kName = "avx2";

  using Eight = __m256;
  static Eight zero() { return _mm256_setzero_ps(); }
  static Eight load(const float* p) { return _mm256_loadu_ps(p); }
  // A load that the compiler does not repeat at each use.
  static Eight load_once(const float* p) {
    Eight v = load(p);
    asm("" : "+x"(v));
    return v;
  }
  static void store(float* p, Eight v) { _mm256_storeu_ps(p, v); }
  static Eight multiply(Eight a, Eight b) { return _mm256_mul_ps(a, b); }
  static Eight multiply_add(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
  static Eight add(Eight a, Eight b) { return _mm256_add_ps(a, b); }
  static Eight broadcast(float x) { return _mm256_set1_ps(x); }
  static float sum(Eight v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  UPG_INLINE static Eight from_int8(const std::int8_t* q) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  UPG_INLINE static Eight primes(const std::uint16_t* k) {
    const std::uint16_t* table = kPrimeLowHalves;
    __m128i low = _mm_cvtsi32_si128(table[k[0]]);
    low = _mm_insert_epi16(low, table[k[1]], 1);
    low = _mm_insert_epi16(low, table[k[2]], 2);
    low = _mm_insert_epi16(low, table[k[3]], 3);
    low = _mm_insert_epi16(low, table[k[4]], 4);
    low = _mm_insert_epi16(low, table[k[5]], 5);
    low = _mm_insert_epi16(low, table[k[6]], 6);
    low = _mm_insert_epi16(low, table[k[7]], 7);
    const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(k));
    const __m128i first = _mm_set1_epi16(static_cast<short>(kFirstPrimeAbove16Bits));
    const __m128i high = _mm_srli_epi16(_mm_cmpeq_epi16(_mm_max_epu16(index, first), index), 15);
    const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
    return _mm256_cvtepi32_ps(both);
  }
  static std::uint32_t running_columns(const std::uint8_t* deltas, std::uint32_t column, std::uint32_t* columns) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(deltas));
    __m128i sums = _mm_cvtepu8_epi16(bytes);
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 2));
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 4));
    sums = _mm_add_epi16(sums, _mm_slli_si128(sums, 8));
    const __m256i all = _mm256_add_epi32(_mm256_cvtepu16_epi32(sums), _mm256_set1_epi32(static_cast<int>(column)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns), all);
    return column + static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_sad_epu8(bytes, _mm_setzero_si128())));
  }
  // Eight loads, not a gather instruction: twice as fast on Zen 4, and Intel's is slow where Downfall is mitigated.
  UPG_INLINE static Eight gather(const float* x, const size_t* c) {
    return _mm256_set_m128(gather_four(x, c + 4), gather_four(x, c));
  }
  UPG_INLINE static Eight from_half(const std::uint16_t* h) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
  }
  UPG_INLINE static void expand(std::uint64_t bits, const std::int8_t* values, std::int8_t* out) {
    for (size_t i = 0; i < 64; i += 8) {
      const std::uint8_t* places = kExpansion[bits >> i & 255];
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
      const __m128i spread = _mm_shuffle_epi8(eight, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), spread);
      values += __builtin_popcountll(bits >> i & 255);
    }
  }
  static size_t sum_bytes(const std::uint8_t* p, size_t count) {
    __m256i sums = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    alignas(32) std::uint64_t part[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), sums);
    size_t total = part[0] + part[1] + part[2] + part[3];
    for (; i < count; ++i) total += p[i];
    return total;
  }

  using Run = Avx2;
  static constexpr size_t kRun = 8;
  static constexpr size_t kSums = 8;

  using Wide = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kUnits = 4;
  static constexpr size_t kBlockRows = 4;
  static constexpr size_t kBlockUnits = 1;
  static Wide wide_zero() { return zero(); }
  static Wide wide_load(const float* p) { return load(p); }
  static void wide_store(float* p, Wide v) { store(p, v); }
  static Wide wide_broadcast(float x) { return broadcast(x); }
  static Wide wide_add(Wide a, Wide b) { return add(a, b); }
  static Wide wide_multiply(Wide a, Wide b) { return multiply(a, b); }
  static Wide wide_multiply_add(Wide a, Wide b, Wide c) { return multiply_add(a, b, c); }

 private:
  UPG_INLINE static __m128 gather_four(const float* x, const size_t* c) {
    __m128 v = _mm_load_ss(x + c[0]);
    v = _mm_insert_ps(v, _mm_load_ss(x + c[1]), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + c[2]), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + c[3]), 0x30);
  }
};

}  // namespace
}  // namespace upg
