// W @ x for one vector and denser rows, with AVX-512: sixteen consecutive entries span few columns, so the vector's
// elements come from registers by a permutation instead of sixteen loads. Two to three times as fast where it applies.
#pragma once

#include "entries.h"
#include "gathered_product.h"
#include "kernels_of.h"
#include "simd_avx512.h"
#include "slabs.h"
#include "vector_product.h"

namespace upg {
namespace {

// Elements `base + index` of x for the sixteen indices, all below kWindow; x + base is aligned.
template <size_t kWindow>
inline __m512 from_window(const float* x, __m512i index) {
  const auto half = [&](const float* w) {
    const __m512 low = _mm512_permutex2var_ps(_mm512_load_ps(w), index, _mm512_load_ps(w + 16));
    const __m512 high = _mm512_permutex2var_ps(_mm512_load_ps(w + 32), index, _mm512_load_ps(w + 48));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
  };
  if constexpr (kWindow == 64) return half(x);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(64)), half(x), half(x + 64));
}

// Sixteen elements of x that a window does not hold. Out of line, or it would take the loop's registers.
__attribute__((noinline)) __m512 gather_sixteen(const std::uint8_t* deltas, const float* x) {
  size_t c[16];
  columns_of<false>(deltas, 0, c);
  columns_of<false>(deltas + 8, c[7], c + 8);
  return _mm512_insertf32x8(_mm512_castps256_ps512(Avx2::gather(x, c)), Avx2::gather(x, c + 8), 1);
}

template <bool kPrime, size_t kWindow>
inline float windowed_product(const Layer& layer, Range e, const float* x) {
  static_assert(kVectorSlack >= kWindow, "a window may reach this far past the vector");
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t column = 0;
  const size_t columns = layer.columns;
  size_t i = e.begin;
  for (; i + 64 <= e.end; i += 64) {
    prefetch_entries<kPrime>(layer, i, 64);
    // Running sums of each sixteen deltas in their own lane, in bytes: they overflow only where the window does not
    // reach, and there they are not used. The lane's total, which does not overflow, says so.
    const __m512i deltas = _mm512_loadu_si512(layer.deltas + i);
    __m512i totals = _mm512_sad_epu8(deltas, _mm512_setzero_si512());
    totals = _mm512_add_epi64(totals, _mm512_bsrli_epi128(totals, 8));
    __m512i running = _mm512_add_epi8(deltas, _mm512_bslli_epi128(deltas, 1));
    running = _mm512_add_epi8(running, _mm512_bslli_epi128(running, 2));
    running = _mm512_add_epi8(running, _mm512_bslli_epi128(running, 4));
    running = _mm512_add_epi8(running, _mm512_bslli_epi128(running, 8));
    const __m512i values = _mm512_loadu_si512(layer.values + i);
    const __m128i running_of[4] = {_mm512_castsi512_si128(running), _mm512_extracti32x4_epi32(running, 1),
                                   _mm512_extracti32x4_epi32(running, 2), _mm512_extracti32x4_epi32(running, 3)};
    const __m128i values_of[4] = {_mm512_castsi512_si128(values), _mm512_extracti32x4_epi32(values, 1),
                                  _mm512_extracti32x4_epi32(values, 2), _mm512_extracti32x4_epi32(values, 3)};
    const __m128i totals_of[4] = {_mm512_castsi512_si128(totals), _mm512_extracti32x4_epi32(totals, 1),
                                  _mm512_extracti32x4_epi32(totals, 2), _mm512_extracti32x4_epi32(totals, 3)};
    size_t starts[5] = {column};
    for (size_t g = 0; g < 4; ++g) {
      starts[g + 1] = starts[g] + static_cast<size_t>(_mm_cvtsi128_si64(totals_of[g]));
    }
    if (UPG_UNLIKELY(starts[4] >= columns)) break;
    for (size_t g = 0; g < 4; ++g) {
      const size_t offset = starts[g] % 16;
      __m512 elements;
      if (!UPG_UNLIKELY(starts[g + 1] - starts[g] + offset >= kWindow)) {
        const __m512i index =
            _mm512_add_epi32(_mm512_cvtepu8_epi32(running_of[g]), _mm512_set1_epi32(static_cast<int>(offset)));
        elements = from_window<kWindow>(x + (starts[g] - offset), index);
      } else {
        elements = gather_sixteen(layer.deltas + i + 16 * g, x + starts[g]);
      }
      __m512 levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values_of[g]));
      if constexpr (kPrime) {
        const std::uint16_t* k = layer.primes + i + 16 * g;
        const __m512 primes = _mm512_insertf32x8(_mm512_castps256_ps512(Avx2::primes(k)), Avx2::primes(k + 8), 1);
        levels = _mm512_mul_ps(levels, primes);
      }
      sums[g % 2] = _mm512_fmadd_ps(levels, elements, sums[g % 2]);
    }
    column = starts[4];
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) +
         gathered_product_with_avx2(layer, i, e.end, column, x);
}

template <bool kPrime>
inline float row_product(const Layer& layer, Range e, const float* x) {
  // Sixteen entries span 16 / density columns and start up to 15 into the window; where most groups would miss it,
  // the branches cost more than the window saves. Measured on Zen 4.
  const size_t entries = e.end - e.begin;
  if (entries * 100 > layer.columns * 37) return windowed_product<kPrime, 64>(layer, e, x);
  if (entries * 100 > layer.columns * 18) return windowed_product<kPrime, 128>(layer, e, x);
  return gathered_product_with_avx2(layer, e.begin, e.end, 0, x);
}

template <class Isa>
void product_with_vector_by_density(const Layer& layer, const float* x, float* y, Range rows) {
  if (layer.index != Index::kDelta8) return product_of_prime_entries<Isa>(layer, x, y, rows);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const float sum = layer.primes ? row_product<true>(layer, e, x) : row_product<false>(layer, e, x);
    y[row] = sum * layer.scales[row];
  }
}

template <class Isa>
constexpr Kernels with_windows() {
  Kernels kernels = kernels_of<Isa>();
  kernels.product_with_vector = product_with_vector_by_density<Isa>;
  return kernels;
}

}  // namespace
}  // namespace upg
