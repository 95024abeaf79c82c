// W @ x for a few vectors and rows that are read whole: every run of values is expanded once and meets all vectors.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"
#include "vector_product.h"

namespace upg {
namespace {

// sums[v] += values * x[v] for kVectors of them, which are `stride` floats apart; sums[v] are registers' worth of
// floats. `columns` is a multiple of 64.
template <class Isa, size_t kVectors>
inline void add_run(const std::int8_t* values, const float* x, size_t stride, size_t columns, float* sums) {
  using Run = typename Isa::Run;
  constexpr size_t kChains = kVectors == 1 ? 4 : 2;
  typename Run::Eight held[kVectors][kChains];
  for (size_t v = 0; v < kVectors; ++v) {
    held[v][0] = Run::load(sums + v * Isa::kRun);
    for (size_t j = 1; j < kChains; ++j) held[v][j] = Run::zero();
  }
  for (size_t c = 0; c < columns; c += kChains * Isa::kRun) {
    for (size_t j = 0; j < kChains; ++j) {
      const typename Run::Eight level = Run::from_int8(values + c + j * Isa::kRun);
      for (size_t v = 0; v < kVectors; ++v) {
        held[v][j] = Run::multiply_add(level, Run::load(x + v * stride + c + j * Isa::kRun), held[v][j]);
      }
    }
  }
  for (size_t v = 0; v < kVectors; ++v) {
    for (size_t j = 1; j < kChains; ++j) held[v][0] = Run::add(held[v][0], held[v][j]);
    Run::store(sums + v * Isa::kRun, held[v][0]);
  }
}

template <class Isa>
inline void add_run_to_all(const std::int8_t* values, const float* x, size_t stride, size_t vectors, size_t columns,
                           float* sums) {
  size_t v = 0;
  for (; v + 4 <= vectors; v += 4) add_run<Isa, 4>(values, x + v * stride, stride, columns, sums + v * Isa::kRun);
  for (; v + 2 <= vectors; v += 2) add_run<Isa, 2>(values, x + v * stride, stride, columns, sums + v * Isa::kRun);
  if (v < vectors) add_run<Isa, 1>(values, x + v * stride, stride, columns, sums + v * Isa::kRun);
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
  alignas(64) std::int8_t buffer[kColumns];
  for (size_t row = rows.begin; row < rows.end; row += kMatrixRows) {
    const size_t count = smaller(kMatrixRows, rows.end - row);
    RowValues<Isa> values[kMatrixRows];
    alignas(64) float sums[kMatrixRows][kSingleVectorsOfWholeRows * Isa::kRun] = {};
    for (size_t t = 0; t < count; ++t) values[t] = RowValues<Isa>(layer, row + t);
    // Column by column for all rows, so that the vectors stay in the first-level cache.
    for (size_t c = 0; c < layer.columns; c += kColumns) {
      const size_t columns = smaller(kColumns, layer.columns - c), whole = columns / 64 * 64;
      for (size_t t = 0; t < count; ++t) {
        const std::int8_t* const run = values[t].next((columns + 63) / 64, buffer);
        if (whole) add_run_to_all<Isa>(run, x + c, stride, vectors, whole, sums[t]);
        if (whole < columns) add_run_to_all<Isa>(run + whole, last, 64, vectors, 64, sums[t]);
      }
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
