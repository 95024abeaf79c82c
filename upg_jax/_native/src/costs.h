// Which way a product is computed, and about how long one thread takes.
#pragma once

#include "row_split.h"
#include "slabs.h"

namespace upg {

// Whether multiplying zeros, too, is faster with many vectors: where few are left out. It depends on shapes only.
inline bool is_matrix(const Layer& layer, size_t vectors) {
  if (layer.index == Index::kDelta8 || layer.primes || vectors <= kSingleVectors) return false;
  return 100 * layer.capacity > 45 * layer.rows * layer.columns;
}

// About how many nanoseconds one thread takes. Forms that read whole rows, or multiply zeros, cost by column whatever their
// entries are. Fitted to matrices of 576 columns in cache on a Zen 4 core with VBMI2; without it, and from memory,
// everything takes longer and is all the more worth sharing.
inline double entries_cost(const Layer& layer, size_t vectors) {
  const double level = layer.primes ? 0.75 : 0.4;  // of one entry
  const double each = vectors <= kSingleVectors ? level * static_cast<double>(vectors)
                                                : level + 0.6 * static_cast<double>(round_up(vectors, kUnit) / kUnit);
  return each * static_cast<double>(RowSplit::work(layer));
}

inline double columns_cost(const Layer& layer, double each) { return each * static_cast<double>(layer.rows * layer.columns); }

inline double product_cost(const Layer& layer, size_t vectors) {
  if (reads_whole_rows(layer, vectors)) {
    const double each = 0.05 + 0.016 * static_cast<double>(vectors);
    return columns_cost(layer, layer.value_bits == 8 ? each : 2 * each);
  }
  if (is_matrix(layer, vectors)) return columns_cost(layer, 0.024 * static_cast<double>(round_up(vectors, kUnit)));
  return entries_cost(layer, vectors);
}

// Whether a few vectors meet whole rows on the way back, too. (Packed by words, fewer columns would take more scratch memory.)
inline bool adds_whole_rows(const Layer& layer, size_t vectors) {
  return reads_whole_rows(layer, vectors) && (vectors <= kSingleVectors || layer.columns >= 64);
}

inline double transposed_cost(const Layer& layer, size_t vectors) {
  if (adds_whole_rows(layer, vectors)) return columns_cost(layer, 0.05 + 0.04 * static_cast<double>(vectors));
  if (is_matrix(layer, vectors)) return columns_cost(layer, 0.026 * static_cast<double>(round_up(vectors, kUnit)));
  return 1.5 * entries_cost(layer, vectors);
}

}  // namespace upg
