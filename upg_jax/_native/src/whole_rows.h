// W @ x for up to eight vectors and rows whose index is a mask, or dense: each row's values are expanded a word of 64
// columns at a time, and multiply consecutive elements of all vectors, zeros, too.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"

namespace upg {
namespace {

// A compiler that does not unroll these loops keeps the sums in memory.
#define UPG_UNROLL _Pragma("GCC unroll 16")

// Calls `use` with the number of vectors, up to eight, as a compile-time constant.
template <class Use>
inline void with_vectors(size_t vectors, Use use) {
  switch (vectors) {
    case 1:
      return use(Constant<1>());
    case 2:
      return use(Constant<2>());
    case 3:
      return use(Constant<3>());
    case 4:
      return use(Constant<4>());
    case 5:
      return use(Constant<5>());
    case 6:
      return use(Constant<6>());
    case 7:
      return use(Constant<7>());
    default:
      return use(Constant<8>());
  }
}

// Adds `words` words of kRows rows from `row` on, which share each load of a vector. Where these are not all words of
// the rows, `read` and `sums` keep what was read and added so far.
template <class Isa, bool kDense, size_t kRows, size_t kVectors>
inline void add_words(const Layer& layer, size_t row, const float* x, size_t words, bool first, bool last,
                      RowWords<Isa>* read, float* sums, float* y) {
  using Run = typename Isa::Run;
  // The same for any number of rows, so that sums do not depend on which rows are taken together.
  constexpr size_t kChains = kVectors == 1 ? 4 : 1;
  RowWords<Isa> rows[kRows];
  typename Run::Eight held[kRows][kVectors][kChains];
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) {
    rows[r] = first ? RowWords<Isa>(layer, row + r) : read[r];
    UPG_UNROLL for (size_t v = 0; v < kVectors; ++v) {
      held[r][v][0] = first ? Run::zero() : Run::load(sums + (r * kVectors + v) * Isa::kRun);
      UPG_UNROLL for (size_t j = 1; j < kChains; ++j) held[r][v][j] = Run::zero();
    }
  }
  // A word is expanded while the one before is multiplied: expansion waits for memory, multiplication for arithmetic.
  alignas(64) std::int8_t buffers[2][kRows][64];
  const std::int8_t* ahead[kRows];
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) ahead[r] = rows[r].template next<kDense>(layer, buffers[0][r]);
  for (size_t w = 1; w <= words; ++w, x += 64 * kVectors) {
    const std::int8_t* values[kRows];
    UPG_UNROLL for (size_t r = 0; r < kRows; ++r) values[r] = ahead[r];
    if (w < words) {
      UPG_UNROLL for (size_t r = 0; r < kRows; ++r) ahead[r] = rows[r].template next<kDense>(layer, buffers[w % 2][r]);
    }
    // Not unrolled: compilers then convert ahead until they run out of registers.
#pragma GCC unroll 1
    for (size_t c = 0; c < 64; c += kChains * Isa::kRun) {
      UPG_UNROLL for (size_t j = 0; j < kChains; ++j) {
        const size_t at = c + j * Isa::kRun;
        typename Run::Eight level[kRows];
        UPG_UNROLL for (size_t r = 0; r < kRows; ++r) level[r] = Run::from_int8(values[r] + at);
        UPG_UNROLL for (size_t v = 0; v < kVectors; ++v) {
          const typename Run::Eight vector = Run::load_once(x + v * 64 + at);
          UPG_UNROLL for (size_t r = 0; r < kRows; ++r) {
            held[r][v][j] = Run::multiply_add(level[r], vector, held[r][v][j]);
          }
        }
      }
    }
  }
  UPG_UNROLL for (size_t r = 0; r < kRows; ++r) {
    if (!last) read[r] = rows[r];
    UPG_UNROLL for (size_t v = 0; v < kVectors; ++v) {
      UPG_UNROLL for (size_t j = 1; j < kChains; ++j) held[r][v][0] = Run::add(held[r][v][0], held[r][v][j]);
      if (last) {
        y[v * layer.rows + row + r] = Run::sum(held[r][v][0]) * layer.scales[row + r];
      } else {
        Run::store(sums + (r * kVectors + v) * Isa::kRun, held[r][v][0]);
      }
    }
  }
}

template <class Isa, bool kDense, size_t kVectors>
inline void product_of_whole_rows_with(const Layer& layer, const float* x, float* y, Range rows) {
  // Vectors that do not fit the first-level cache meet a tile of rows a piece at a time.
  constexpr size_t kTile = 8, kWords = 80 / kVectors;
  constexpr size_t kRows = Isa::kSums >= 2 * kVectors ? 2 : 1;
  const size_t words = words_of(layer), pieces = (words + kWords - 1) / kWords;
  const size_t step = (words + pieces - 1) / pieces;
  RowWords<Isa> read[kTile];
  alignas(64) float sums[kTile][kVectors * Isa::kRun];
  for (size_t tile = rows.begin; tile < rows.end; tile += kTile) {
    const size_t count = smaller(kTile, rows.end - tile);
    for (size_t word = 0; word < words; word += step) {
      const size_t n = smaller(step, words - word);
      size_t t = 0;
      const auto add = [&](auto together) {
        for (; t + together.value <= count; t += together.value) {
          add_words<Isa, kDense, together.value, kVectors>(layer, tile + t, x + word * 64 * kVectors, n, word == 0,
                                                           word + n == words, read + t, sums[t], y);
        }
      };
      // Dense rows for one vector wait for memory, which one stream at a time reads faster.
      if (kVectors > 1 || !kDense) add(Constant<kRows>());
      add(Constant<1>());
    }
  }
}

template <class Isa>
void product_of_whole_rows(const Layer& layer, const float* x, size_t vectors, float* y, Range rows) {
  if (layer.columns == 0) {
    for (size_t v = 0; v < vectors; ++v) {
      for (size_t row = rows.begin; row < rows.end; ++row) y[v * layer.rows + row] = 0;
    }
    return;
  }
  with_vectors(vectors, [&](auto count) {
    if (layer.index == Index::kDense) return product_of_whole_rows_with<Isa, true, count.value>(layer, x, y, rows);
    product_of_whole_rows_with<Isa, false, count.value>(layer, x, y, rows);
  });
}

}  // namespace
}  // namespace upg
