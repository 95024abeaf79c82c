// Both products with packed vectors for rows that are nearly full: blocks of them as floats, multiplied like dense
// matrices. Zeros are multiplied, too, but every load of a vector serves several rows.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"

namespace upg {
namespace {

constexpr size_t kBlockColumns = 512;
// Not a power of two, or the rows of a block would compete for the same places in the cache.
constexpr size_t kBlockStride = kBlockColumns + kUnit;
static_assert(kMatrixRows * kBlockStride <= Workspace::kPaddedEntries, "a block must fit the workspace");
static_assert(kMatrixRows <= Workspace::kRows, "a tile's sums must fit the workspace");

// Yields blocks of some rows as floats, column block by column block.
template <class Isa>
class RowBlocks {
 public:
  RowBlocks(const Layer& layer, size_t row, size_t rows, float* levels) : layer_(layer), rows_(rows), levels_(levels) {
    for (size_t t = 0; t < rows; ++t) values_[t] = RowWords<Isa>(layer, row + t);
  }

  void next(size_t columns) {
    using Run = typename Isa::Run;
    alignas(64) std::int8_t buffer[64];
    for (size_t t = 0; t < rows_; ++t) {
      float* const out = levels_ + t * kBlockStride;
      for (size_t word = 0; word < columns; word += 64) {
        const std::int8_t* values = values_[t].next(layer_, buffer);
        for (size_t c = 0; c < 64; c += Isa::kRun) Run::store(out + word + c, Run::from_int8(values + c));
      }
    }
  }

 private:
  static_assert(kBlockColumns % 64 == 0, "values come in whole words");
  const Layer& layer_;
  RowWords<Isa> values_[kMatrixRows];
  size_t rows_;
  float* levels_;
};

// sums[i] += sum over k of a[i * kBlockStride + k] * b[k], or, transposed, of a[k * kBlockStride + i] * b[k], for kRows
// of i. b[k] and sums[i] are runs of floats, `width` apart, of which this takes kUnits * 16.
template <class Isa, bool kTransposed, size_t kRows, size_t kUnits>
inline void multiply_block(const float* a, const float* b, size_t depth, size_t width, float* sums) {
  constexpr size_t kWides = kUnits * kUnit / Isa::kLanes;
  typename Isa::Wide held[kRows][kWides];
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t w = 0; w < kWides; ++w) held[i][w] = Isa::wide_load(sums + i * width + w * Isa::kLanes);
  }
  for (size_t k = 0; k < depth; ++k) {
    typename Isa::Wide run[kWides];
    for (size_t w = 0; w < kWides; ++w) run[w] = Isa::wide_load(b + k * width + w * Isa::kLanes);
    for (size_t i = 0; i < kRows; ++i) {
      const typename Isa::Wide factor = Isa::wide_broadcast(kTransposed ? a[k * kBlockStride + i] : a[i * kBlockStride + k]);
      for (size_t w = 0; w < kWides; ++w) held[i][w] = Isa::wide_multiply_add(factor, run[w], held[i][w]);
    }
  }
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t w = 0; w < kWides; ++w) Isa::wide_store(sums + i * width + w * Isa::kLanes, held[i][w]);
  }
}

// The same for any number of rows and a whole slab.
template <class Isa, bool kTransposed>
inline void multiply_blocks(const float* a, const float* b, size_t rows, size_t depth, size_t width, float* sums) {
  constexpr size_t kRows = Isa::kBlockRows, kStep = kTransposed ? 1 : kBlockStride;
  size_t unit = 0;
  const auto all_rows = [&](auto units) {
    size_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      multiply_block<Isa, kTransposed, kRows, units.value>(a + i * kStep, b + unit, depth, width, sums + i * width + unit);
    }
    for (; i < rows; ++i) {
      multiply_block<Isa, kTransposed, 1, units.value>(a + i * kStep, b + unit, depth, width, sums + i * width + unit);
    }
    unit += units.value * kUnit;
  };
  while (unit + Isa::kBlockUnits * kUnit <= width) all_rows(Constant<Isa::kBlockUnits>());
  while (unit < width) all_rows(Constant<1>());
}

template <class Isa>
void matrix_product(const Layer& layer, const float* x, size_t vectors, float* y, Range slabs, Range rows, Workspace& w) {
  for (size_t row = rows.begin; row < rows.end; row += kMatrixRows) {
    const size_t count = smaller(kMatrixRows, rows.end - row);
    for (size_t s = slabs.begin; s < slabs.end; ++s) {
      const Slab slab = slab_at(s, vectors, layer.columns);
      float* const sums = w.accumulators;
      for (size_t i = 0; i < count * slab.width; ++i) sums[i] = 0;
      RowBlocks<Isa> blocks(layer, row, count, w.levels);
      for (size_t c = 0; c < layer.columns; c += kBlockColumns) {
        const size_t columns = smaller(kBlockColumns, layer.columns - c);
        blocks.next(columns);
        multiply_blocks<Isa, false>(w.levels, x + slab.offset + c * slab.width, count, columns, slab.width, sums);
      }
      const size_t present = smaller(slab.width, vectors - slab.first);
      for (size_t v = 0; v < present; ++v) {
        float* const out = y + (slab.first + v) * layer.rows + row;
        for (size_t t = 0; t < count; ++t) out[t] = sums[t * slab.width + v] * layer.scales[row + t];
      }
    }
  }
}

template <class Isa>
void add_transposed_matrix(const Layer& layer, const float* g, float* y, size_t width, Range rows, Workspace& w) {
  for (size_t row = rows.begin; row < rows.end; row += kMatrixRows) {
    const size_t count = smaller(kMatrixRows, rows.end - row);
    float* const scaled = w.accumulators;
    for (size_t t = 0; t < count; ++t) {
      for (size_t v = 0; v < width; ++v) scaled[t * width + v] = g[(row + t) * width + v] * layer.scales[row + t];
    }
    RowBlocks<Isa> blocks(layer, row, count, w.levels);
    for (size_t c = 0; c < layer.columns; c += kBlockColumns) {
      const size_t columns = smaller(kBlockColumns, layer.columns - c);
      blocks.next(columns);
      multiply_blocks<Isa, true>(w.levels, scaled, columns, count, width, y + c * width);
    }
  }
}

}  // namespace
}  // namespace upg
