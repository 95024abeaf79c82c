// Attention of one new position over a cache of keys and values, as it lies there.
//
// One pass with a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), so that
// any number of positions needs the same small memory.
#pragma once

#include "dense.h"
#include "half.h"
#include "kernels.h"

namespace upg {
namespace {

// exp(x) for x <= 0, to about an ulp: 2**n from the bits, the rest by Cephes' polynomial. Branchless, so that compilers
// vectorize loops of it. NaN stays NaN.
inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it leaves an integer in the low bits
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return (p * r * r + r + 1.0f) * float_from_bits((bits << 23) + 0x3f800000u);
}

inline float tanh_of(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_of_negative(-2 * magnitude);
  const float t = (1 - e) / (1 + e);
  return x < 0 ? -t : t;
}

template <class Isa>
inline float dot(const float* a, const float* b, size_t count) {
  using Run = typename Isa::Run;
  typename Run::Eight sum = Run::zero();
  size_t i = 0;
  for (; i + Isa::kRun <= count; i += Isa::kRun) sum = Run::multiply_add(Run::load(a + i), Run::load(b + i), sum);
  float total = Run::sum(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// sums += weights[s] * rows[s], rows of `dim` floats.
template <class Isa>
inline void add_weighted(const float* weights, const float* rows, size_t count, size_t dim, float* sums) {
  using Run = typename Isa::Run;
  constexpr size_t kRuns = 4;
  size_t d = 0;
  for (; d + kRuns * Isa::kRun <= dim; d += kRuns * Isa::kRun) {
    typename Run::Eight held[kRuns];
    for (size_t j = 0; j < kRuns; ++j) held[j] = Run::load(sums + d + j * Isa::kRun);
    for (size_t s = 0; s < count; ++s) {
      const typename Run::Eight weight = Run::broadcast(weights[s]);
      for (size_t j = 0; j < kRuns; ++j) {
        held[j] = Run::multiply_add(weight, Run::load(rows + s * dim + d + j * Isa::kRun), held[j]);
      }
    }
    for (size_t j = 0; j < kRuns; ++j) Run::store(sums + d + j * Isa::kRun, held[j]);
  }
  for (; d < dim; ++d) {
    for (size_t s = 0; s < count; ++s) sums[d] += weights[s] * rows[s * dim + d];
  }
}

// `count` numbers as floats: where they lie if they are, else in `buffer`.
template <class Isa>
inline const float* floats_of(const void* data, Element element, size_t at, size_t count, float* buffer) {
  if (element == Element::kFloat32) return static_cast<const float*>(data) + at;
  to_float<Isa>(static_cast<const std::uint16_t*>(data) + at, element, buffer, count);
  return buffer;
}

template <class Isa>
void attend(const Attention& a, float* out, size_t item, Workspace& w) {
  constexpr size_t kPositions = 64;
  static_assert(kPositions * Attention::kMostDim <= Workspace::kEntries, "rows must fit the workspace");
  const size_t b = item / a.heads, head = item % a.heads;
  const size_t slots = slots_of(a, b);
  const size_t rows = ((a.layer * a.batch + b) * a.kv_heads + head / (a.heads / a.kv_heads)) * a.length;
  float query[Attention::kMostDim], sums[Attention::kMostDim] = {}, weights[kPositions];
  const float* const q = floats_of<Isa>(a.queries, a.element, item * a.dim, a.dim, query);
  const std::int64_t position = a.positions[b], newest = std::int64_t{a.filled[b]} - 1;
  const auto visible = [&](size_t slot) {
    // A ring: what a slot holds is the last position that belongs there.
    const std::int64_t length = static_cast<std::int64_t>(a.length), s = static_cast<std::int64_t>(slot);
    const std::int64_t behind = position - (newest < length ? s : newest - (newest - s) % length);
    return behind >= 0 && (a.window == 0 || behind < a.window);
  };
  constexpr float kNone = -__builtin_inff();
  float most = kNone, total = 0;
  for (size_t first = 0; first < slots; first += kPositions) {
    const size_t n = smaller(kPositions, slots - first);
    const float* const keys = floats_of<Isa>(a.keys, a.element, (rows + first) * a.dim, n * a.dim, w.levels);
    float top = most;
    for (size_t s = 0; s < n; ++s) {
      float score = dot<Isa>(q, keys + s * a.dim, a.dim) * a.scale;
      if (a.cap > 0) score = a.cap * tanh_of(score / a.cap);
      weights[s] = visible(first + s) ? score : kNone;
      if (weights[s] > top) top = weights[s];
    }
    // Nothing to see so far; a score that is no number goes on, to be one in the result.
    bool none = top == kNone;
    for (size_t s = 0; s < n; ++s) none = none && weights[s] == kNone;
    if (none) continue;
    const float shrink = most == kNone ? 0 : exp_of_negative(most - top);
    for (size_t s = 0; s < n; ++s) {
      const float weight = exp_of_negative(weights[s] - top);
      weights[s] = weights[s] == kNone ? 0 : weight;
    }
    total *= shrink;
    for (size_t s = 0; s < n; ++s) total += weights[s];
    for (size_t d = 0; d < a.dim; ++d) sums[d] *= shrink;
    const float* const values = floats_of<Isa>(a.values, a.element, (rows + first) * a.dim, n * a.dim, w.levels);
    add_weighted<Isa>(weights, values, n, a.dim, sums);
    most = top;
  }
  for (size_t d = 0; d < a.dim; ++d) out[item * a.dim + d] = total == 0 ? 0 : sums[d] / total;
}

}  // namespace
}  // namespace upg
