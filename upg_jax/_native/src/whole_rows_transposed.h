// G @ W for four to eight vectors and rows whose index is a mask, or dense: some rows are expanded a word of 64 columns at a
// time, and add up in registers what they add to each vector's sums. Zeros multiply, too.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"
#include "whole_rows.h"

namespace upg {
namespace {

// Of kRows rows from `row` on; sums do not depend on how many rows are taken together.
template <class Isa, bool kDense, size_t kRows>
inline void add_rows_transposed(const Layer& layer, size_t row, const float* g, size_t vectors, float* y) {
  using Run = typename Isa::Run;
  RowWords<Isa> read[kRows];
  float factors[kVectorsOfWholeRows][kRows];
  for (size_t r = 0; r < kRows; ++r) {
    read[r] = RowWords<Isa>(layer, row + r);
    for (size_t v = 0; v < vectors; ++v) factors[v][r] = g[(row + r) * kUnit + v] * layer.scales[row + r];
  }
  alignas(64) std::int8_t buffers[kRows][64];
  for (size_t word = words_of(layer); word > 0; --word, y += 64 * vectors) {
    const std::int8_t* values[kRows];
    UPG_UNROLL for (size_t r = 0; r < kRows; ++r) values[r] = read[r].template next<kDense>(layer, buffers[r]);
#pragma GCC unroll 1
    for (size_t c = 0; c < 64; c += Isa::kRun) {
      typename Run::Eight level[kRows];
      UPG_UNROLL for (size_t r = 0; r < kRows; ++r) level[r] = Run::from_int8(values[r] + c);
#pragma GCC unroll 1
      for (size_t v = 0; v < vectors; ++v) {
        float* const at = y + v * 64 + c;
        typename Run::Eight sum = Run::load(at);
        UPG_UNROLL for (size_t r = 0; r < kRows; ++r) {
          sum = Run::multiply_add(level[r], Run::broadcast(factors[v][r]), sum);
        }
        Run::store(at, sum);
      }
    }
  }
}

template <class Isa, bool kDense>
inline void add_transposed_whole_rows_of(const Layer& layer, const float* g, size_t vectors, float* y, Range rows) {
  constexpr size_t kRows = Isa::kRun == 16 ? 8 : 4;
  size_t row = rows.begin;
  for (; row + kRows <= rows.end; row += kRows) add_rows_transposed<Isa, kDense, kRows>(layer, row, g, vectors, y);
  for (; row < rows.end; ++row) add_rows_transposed<Isa, kDense, 1>(layer, row, g, vectors, y);
}

template <class Isa>
void add_transposed_whole_rows(const Layer& layer, const float* g, size_t vectors, float* y, Range rows) {
  if (layer.index == Index::kDense) return add_transposed_whole_rows_of<Isa, true>(layer, g, vectors, y, rows);
  add_transposed_whole_rows_of<Isa, false>(layer, g, vectors, y, rows);
}

}  // namespace
}  // namespace upg
