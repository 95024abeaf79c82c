// Decoding to dense rows, the check of columns, and conversion to float32.
#pragma once

#include "half.h"
#include "narrow.h"
#include "rows.h"

namespace upg {
namespace {

template <class Isa, bool kPrime>
inline void decode_row(const Layer& layer, Range e, float* out) {
  for_entries<kPrime>(
      layer, e.begin, e.end, 0,
      [&](const size_t* c, const std::int8_t* q, const std::uint16_t* k) {
        float levels[8];
        Isa::store(levels, levels_of<Isa, kPrime>(q, k));
        // Entries on one column add, in their order.
        for (size_t j = 0; j < 8; ++j) out[c[j]] += levels[j];
      },
      [&](size_t column, std::int8_t q, const std::uint16_t* k) { out[column] += level_of<kPrime>(q, k); });
}

template <class Isa>
inline void decode_expanded_row(const Layer& layer, size_t row, float* out) {
  using Run = typename Isa::Run;
  const float scale = layer.scales[row];
  const typename Run::Eight scales = Run::broadcast(scale);
  for_row_values<Isa>(layer, row, [&](size_t first, const std::int8_t* values, size_t columns) {
    float* const at = out + first;
    size_t c = 0;
    for (; c + Isa::kRun <= columns; c += Isa::kRun) {
      Run::store(at + c, Run::multiply(Run::from_int8(values + c), scales));
    }
    for (; c < columns; ++c) at[c] = static_cast<float>(values[c]) * scale;
  });
}

template <class Isa>
void decode(const Layer& layer, float* out, Range rows) {
  if (layer.value_bits != 8) return decode_narrow<Isa>(layer, out, rows);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    float* const dense = out + (row - rows.begin) * layer.columns;
    if (layer.index != Index::kDelta8 && !layer.primes) {
      decode_expanded_row<Isa>(layer, row, dense);
      continue;
    }
    __builtin_memset(dense, 0, layer.columns * sizeof(float));
    if (layer.index != Index::kDelta8) {
      for_row_entries<Isa, true>(layer, row, [&](const std::uint32_t* columns, const float* levels, size_t n) {
        for (size_t i = 0; i < n; ++i) dense[columns[i]] += levels[i];
      });
    } else if (layer.primes) {
      decode_row<Isa, true>(layer, entries_of(layer, row), dense);
    } else {
      decode_row<Isa, false>(layer, entries_of(layer, row), dense);
    }
    const float scale = layer.scales[row];
    const typename Isa::Eight scales = Isa::broadcast(scale);
    size_t c = 0;
    for (; c + 8 <= layer.columns; c += 8) Isa::store(dense + c, Isa::multiply(Isa::load(dense + c), scales));
    for (; c < layer.columns; ++c) dense[c] *= scale;
  }
}

template <class Isa>
size_t first_row_outside(const Layer& layer) {
  for (size_t row = 0; row < layer.rows; ++row) {
    const Range e = entries_of(layer, row);
    if (e.begin < e.end && Isa::sum_bytes(layer.deltas + e.begin, e.end - e.begin) >= layer.columns) return row;
  }
  return layer.rows;
}

template <class Isa>
void to_float(const void* x, Element element, float* out, size_t count) {
  if (element == Element::kFloat32) {
    __builtin_memcpy(out, x, count * sizeof(float));
    return;
  }
  const std::uint16_t* const in = static_cast<const std::uint16_t*>(x);
  size_t i = 0;
  if (element == Element::kFloat16) {
    for (; i + 8 <= count; i += 8) Isa::store(out + i, Isa::from_half(in + i));
    for (; i < count; ++i) out[i] = float_from_half(in[i]);
    return;
  }
  for (; i < count; ++i) out[i] = float_from_bfloat16(in[i]);
}

// Written for the compiler to vectorize.
template <class Isa>
void to_bfloat16(const float* x, std::uint16_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = bfloat16_from_float(x[i]);
}

}  // namespace
}  // namespace upg
