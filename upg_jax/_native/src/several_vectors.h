// W @ x for a few vectors and rows that are read whole: every run of values is expanded once and meets all vectors.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"
#include "vector_product.h"

namespace upg {
namespace {

// sums[r][v] += values[r] * x[v] for kRows rows, which share each load of a vector, and kVectors vectors, which are
// `stride` floats apart; `sums` are registers' worth of floats, kSingleVectorsOfWholeRows of them for each row.
// `columns` is a multiple of 64.
template <class Isa, size_t kRows, size_t kVectors>
inline void add_run(const std::int8_t* const* values, const float* x, size_t stride, size_t columns, float* sums) {
  using Run = typename Isa::Run;
  // The same for any number of rows, so that sums do not depend on which rows are taken together.
  constexpr size_t kChains = kVectors == 1 ? 4 : kVectors == 2 ? 2 : 1;
  constexpr size_t kRowSums = kSingleVectorsOfWholeRows * Isa::kRun;
  typename Run::Eight held[kRows][kVectors][kChains];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) {
      held[r][v][0] = Run::load(sums + r * kRowSums + v * Isa::kRun);
      for (size_t j = 1; j < kChains; ++j) held[r][v][j] = Run::zero();
    }
  }
  for (size_t c = 0; c < columns; c += kChains * Isa::kRun) {
    for (size_t j = 0; j < kChains; ++j) {
      const size_t at = c + j * Isa::kRun;
      typename Run::Eight level[kRows];
      for (size_t r = 0; r < kRows; ++r) level[r] = Run::from_int8(values[r] + at);
      for (size_t v = 0; v < kVectors; ++v) {
        const typename Run::Eight vector = Run::load_once(x + v * stride + at);
        for (size_t r = 0; r < kRows; ++r) held[r][v][j] = Run::multiply_add(level[r], vector, held[r][v][j]);
      }
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) {
      for (size_t j = 1; j < kChains; ++j) held[r][v][0] = Run::add(held[r][v][0], held[r][v][j]);
      Run::store(sums + r * kRowSums + v * Isa::kRun, held[r][v][0]);
    }
  }
}

template <class Isa, size_t kRows>
inline void add_run_to_all(const std::int8_t* const* values, const float* x, size_t stride, size_t vectors,
                           size_t columns, float* sums) {
  size_t v = 0;
  const auto add = [&](auto together) {
    for (; v + together.value <= vectors; v += together.value) {
      add_run<Isa, kRows, together.value>(values, x + v * stride, stride, columns, sums + v * Isa::kRun);
    }
  };
  add(Constant<4>());
  add(Constant<2>());
  add(Constant<1>());
}

template <class Isa>
void product_with_vectors(const Layer& layer, const float* x, size_t vectors, float* y, Range rows) {
  using Run = typename Isa::Run;
  constexpr size_t kColumns = 64 * RowValues<Isa>::kWords;
  const size_t stride = vector_stride(layer.columns);
  // The vectors from the last whole word of 64 columns on, then zeros.
  alignas(64) float last[kSingleVectorsOfWholeRows * 64] = {};
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t c = layer.columns / 64 * 64; c < layer.columns; ++c) last[v * 64 + c % 64] = x[v * stride + c];
  }
  alignas(64) std::int8_t buffers[Isa::kRowsTogether][kColumns];
  for (size_t row = rows.begin; row < rows.end; row += kMatrixRows) {
    const size_t count = smaller(kMatrixRows, rows.end - row);
    RowValues<Isa> values[kMatrixRows];
    alignas(64) float sums[kMatrixRows][kSingleVectorsOfWholeRows * Isa::kRun] = {};
    for (size_t t = 0; t < count; ++t) values[t] = RowValues<Isa>(layer, row + t);
    // Column by column for all rows, so that the vectors stay in the first-level cache.
    for (size_t c = 0; c < layer.columns; c += kColumns) {
      const size_t columns = smaller(kColumns, layer.columns - c), whole = columns / 64 * 64;
      size_t t = 0;
      const auto add = [&](auto together) {
        constexpr size_t kRows = decltype(together)::value;
        for (; t + kRows <= count; t += kRows) {
          const std::int8_t* runs[kRows];
          for (size_t r = 0; r < kRows; ++r) runs[r] = values[t + r].next((columns + 63) / 64, buffers[r]);
          if (whole) add_run_to_all<Isa, kRows>(runs, x + c, stride, vectors, whole, sums[t]);
          if (whole < columns) {
            for (size_t r = 0; r < kRows; ++r) runs[r] += whole;
            add_run_to_all<Isa, kRows>(runs, last, 64, vectors, 64, sums[t]);
          }
        }
      };
      add(Constant<Isa::kRowsTogether>());
      add(Constant<1>());
    }
    for (size_t t = 0; t < count; ++t) {
      for (size_t v = 0; v < vectors; ++v) {
        y[v * layer.rows + row + t] = Run::sum(Run::load(sums[t] + v * Isa::kRun)) * layer.scales[row + t];
      }
    }
  }
}

}  // namespace
}  // namespace upg
