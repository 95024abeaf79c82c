// G @ W for up to eight vectors and rows whose index is a mask, or dense: rows are expanded as in whole_rows.h, and
// several of them share each load and store of the sums. Zeros multiply, too.
#pragma once

#include "whole_rows.h"

namespace upg {
namespace {

// y += factors * values for `words` words of kRows rows from `row` on. A sum takes its rows one after the other, so that
// results do not depend on which rows are taken together. `read` keeps where the rows were left.
template <class Isa, bool kDense, size_t kRows, size_t kVectors>
inline void scatter_words(const Layer& layer, size_t row, const float* g, size_t words, bool first, RowWords<Isa>* read,
                          float* y) {
  using Run = typename Isa::Run;
  constexpr size_t kChains = kVectors == 1 ? 4 : 1;
  // How `pack` lays out few vectors (slabs.h).
  const size_t next_vector = kVectors <= kSingleVectors ? vector_stride(layer.rows) : 1;
  constexpr size_t next_row = kVectors <= kSingleVectors ? 1 : kUnit;
  RowWords<Isa> rows[kRows];
  typename Run::Eight factors[kRows][kVectors];
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) {
    rows[r] = first ? RowWords<Isa>(layer, row + r) : read[r];
    UPG_UNROLL for (size_t v = 0; v < kVectors; ++v) {
      factors[r][v] = Run::broadcast(g[v * next_vector + (row + r) * next_row] * layer.scales[row + r]);
    }
  }
  alignas(64) std::int8_t buffers[2][kRows][64];
  const std::int8_t* ahead[kRows];
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) ahead[r] = rows[r].template next<kDense>(layer, buffers[0][r]);
  for (size_t w = 1; w <= words; ++w, y += 64 * kVectors) {
    const std::int8_t* values[kRows];
    UPG_UNROLL for (size_t r = 0; r < kRows; ++r) values[r] = ahead[r];
    if (w < words) {
      UPG_UNROLL for (size_t r = 0; r < kRows; ++r) ahead[r] = rows[r].template next<kDense>(layer, buffers[w % 2][r]);
    }
#pragma GCC unroll 1
    for (size_t c = 0; c < 64; c += kChains * Isa::kRun) {
      UPG_UNROLL for (size_t j = 0; j < kChains; ++j) {
        const size_t at = c + j * Isa::kRun;
        typename Run::Eight level[kRows];
        UPG_UNROLL for (size_t r = 0; r < kRows; ++r) level[r] = Run::from_int8(values[r] + at);
        UPG_UNROLL for (size_t v = 0; v < kVectors; ++v) {
          typename Run::Eight sum = Run::load(y + v * 64 + at);
          UPG_UNROLL for (size_t r = 0; r < kRows; ++r) sum = Run::multiply_add(level[r], factors[r][v], sum);
          Run::store(y + v * 64 + at, sum);
        }
      }
    }
  }
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) read[r] = rows[r];
}

template <class Isa, bool kDense, size_t kVectors>
inline void add_transposed_whole_rows_with(const Layer& layer, const float* g, float* y, Range rows) {
  // Sums that do not fit the first-level cache meet a tile of rows a piece at a time.
  constexpr size_t kTile = 16, kWords = 80 / kVectors;
  // Dense rows for one vector wait for memory, which one stream at a time reads faster.
  constexpr size_t kRows = kDense && kVectors == 1 ? 1 : 4;
  const size_t words = words_of(layer), pieces = (words + kWords - 1) / kWords;
  const size_t step = (words + pieces - 1) / pieces;
  RowWords<Isa> read[kTile];
  for (size_t tile = rows.begin; tile < rows.end; tile += kTile) {
    const size_t count = smaller(kTile, rows.end - tile);
    for (size_t word = 0; word < words; word += step) {
      const size_t n = smaller(step, words - word);
      size_t t = 0;
      const auto add = [&](auto together) {
        for (; t + together.value <= count; t += together.value) {
          scatter_words<Isa, kDense, together.value, kVectors>(layer, tile + t, g, n, word == 0, read + t,
                                                               y + word * 64 * kVectors);
        }
      };
      add(Constant<kRows>());
      if constexpr (kRows > 1) add(Constant<1>());
    }
  }
}

template <class Isa>
void add_transposed_whole_rows(const Layer& layer, const float* g, size_t vectors, float* y, Range rows) {
  if (layer.columns == 0) return;
  with_vectors(vectors, [&](auto count) {
    if (layer.index == Index::kDense) return add_transposed_whole_rows_with<Isa, true, count.value>(layer, g, y, rows);
    add_transposed_whole_rows_with<Isa, false, count.value>(layer, g, y, rows);
  });
}

}  // namespace
}  // namespace upg
