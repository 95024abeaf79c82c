// W @ x for one vector: gather the vector's elements by column.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"

namespace upg {
namespace {

// The unscaled product of entries [begin, end) of a row, the first of which counts from `column`.
template <class Isa, bool kPrime>
inline float gathered_product(const Layer& layer, size_t begin, size_t end, size_t column, const float* x) {
  using Eight = typename Isa::Eight;
  Eight sums[2] = {Isa::zero(), Isa::zero()};
  float rest = 0;
  const std::int8_t* const values = layer.values;
  const std::uint8_t* const deltas = layer.deltas;
  const size_t columns = layer.columns;
  size_t i = begin;
  // Two groups a turn, so that consecutive sums do not wait for one another.
  for (; i + 16 <= end; i += 16) {
    size_t c[8];
    prefetch_entries<kPrime>(layer, i, 16);
    columns_of<kPrime>(deltas + i, column, c);
    if (UPG_UNLIKELY(c[7] >= columns)) break;
    const Eight first = levels_of<Isa, kPrime>(values + i, primes_at<kPrime>(layer, i));
    sums[0] = Isa::multiply_add(first, Isa::gather(x, c), sums[0]);
    column = c[7];
    columns_of<kPrime>(deltas + i + 8, column, c);
    if (UPG_UNLIKELY(c[7] >= columns)) {
      i += 8;
      break;
    }
    const Eight second = levels_of<Isa, kPrime>(values + i + 8, primes_at<kPrime>(layer, i + 8));
    sums[1] = Isa::multiply_add(second, Isa::gather(x, c), sums[1]);
    column = c[7];
  }
  for_entries<kPrime>(
      layer, i, end, column,
      [&](const size_t* c, const std::int8_t* q, const std::uint16_t* k) {
        sums[0] = Isa::multiply_add(levels_of<Isa, kPrime>(q, k), Isa::gather(x, c), sums[0]);
      },
      [&](size_t at, std::int8_t q, const std::uint16_t* k) { rest += level_of<kPrime>(q, k) * x[at]; });
  return Isa::sum(Isa::add(sums[0], sums[1])) + rest;
}

// The unscaled product of a row of the prime manifold whose index is a mask, or dense: the table's look-ups cost most, so
// only what is there is multiplied.
template <class Isa>
inline float prime_entries_product(const Layer& layer, size_t row, const float* x) {
  typename Isa::Eight sum = Isa::zero();
  for_row_entries<Isa, true>(layer, row, [&](const std::uint32_t* columns, const float* levels, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
      size_t c[8];
      for (size_t j = 0; j < 8; ++j) c[j] = columns[i + j];
      sum = Isa::multiply_add(Isa::load(levels + i), Isa::gather(x, c), sum);
    }
    float elements[8] = {};
    for (size_t j = 0; i + j < n; ++j) elements[j] = x[columns[i + j]];
    if (i < n) sum = Isa::multiply_add(Isa::load(levels + i), Isa::load(elements), sum);
  });
  return Isa::sum(sum);
}

template <class Isa>
inline void product_of_prime_entries(const Layer& layer, const float* x, float* y, Range rows) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    y[row] = prime_entries_product<Isa>(layer, row, x) * layer.scales[row];
  }
}

template <class Isa>
void product_with_vector(const Layer& layer, const float* x, float* y, Range rows) {
  if (layer.index != Index::kDelta8) return product_of_prime_entries<Isa>(layer, x, y, rows);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const float sum = layer.primes ? gathered_product<Isa, true>(layer, e.begin, e.end, 0, x)
                                   : gathered_product<Isa, false>(layer, e.begin, e.end, 0, x);
    y[row] = sum * layer.scales[row];
  }
}

// y += (g[row] * scale) * levels, a row at a time.
template <class Isa, bool kPrime>
inline void scatter_row(const Layer& layer, Range e, float g, float* y) {
  const typename Isa::Eight factor = Isa::broadcast(g);
  for_entries<kPrime>(
      layer, e.begin, e.end, 0,
      [&](const size_t* c, const std::int8_t* q, const std::uint16_t* k) {
        float terms[8];
        Isa::store(terms, Isa::multiply(factor, levels_of<Isa, kPrime>(q, k)));
        for (size_t j = 0; j < 8; ++j) y[c[j]] += terms[j];
      },
      [&](size_t column, std::int8_t q, const std::uint16_t* k) { y[column] += g * level_of<kPrime>(q, k); });
}

// The same for a row of the prime manifold whose index is a mask, or dense.
template <class Isa>
inline void scatter_prime_entries(const Layer& layer, size_t row, float g, float* y) {
  for_row_entries<Isa, true>(layer, row, [&](const std::uint32_t* columns, const float* levels, size_t n) {
    for (size_t i = 0; i < n; ++i) y[columns[i]] += g * levels[i];
  });
}

template <class Isa>
void add_transposed_with_vector(const Layer& layer, const float* g, float* y, Range rows) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const float scaled = g[row] * layer.scales[row];
    if (layer.index != Index::kDelta8) {
      scatter_prime_entries<Isa>(layer, row, scaled, y);
    } else if (layer.primes) {
      scatter_row<Isa, true>(layer, e, scaled, y);
    } else {
      scatter_row<Isa, false>(layer, e, scaled, y);
    }
  }
}

}  // namespace
}  // namespace upg
