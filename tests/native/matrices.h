// Matrices for the driver in every index, valid and as bad as can be, and what they mean by a plain loop over the entries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "half.h"
#include "planes.h"

namespace upg {

inline std::mt19937 rng;

inline size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(rng); }
inline float uniform() { return std::uniform_real_distribution<float>(-1, 1)(rng); }

inline std::vector<std::uint32_t> first_primes() {
  std::vector<std::uint32_t> found;
  for (std::uint32_t n = 2; found.size() < 10000; ++n) {
    bool prime = true;
    for (size_t i = 0; i < found.size() && found[i] * found[i] <= n && prime; ++i) prime = n % found[i] != 0;
    if (prime) found.push_back(n);
  }
  return found;
}

// The columns of a row's entries, in order; entries past their end have none, as have those of columns outside.
inline std::vector<size_t> columns_of(const Planes& p, size_t row) {
  std::vector<size_t> columns;
  const size_t begin = p.row_pointers[row], end = p.row_pointers[row + 1];
  if (p.index == Index::kMask) {
    for (size_t c = 0; c < p.columns && columns.size() < end - begin; ++c) {
      if (p.deltas[row * p.row_bytes() + c / 8] >> c % 8 & 1) columns.push_back(c);
    }
    return columns;
  }
  size_t column = 0;
  for (size_t i = begin; i < end; ++i) {
    column = p.index == Index::kDense ? i - begin : column + p.deltas[i];
    if (column >= p.columns) break;
    columns.push_back(column);
  }
  return columns;
}

inline void add_entry(Planes& p, size_t delta, int value) {
  p.deltas.push_back(static_cast<std::uint8_t>(delta));
  p.values.push_back(static_cast<std::int8_t>(value));
  p.primes.push_back(static_cast<std::uint16_t>(value ? below(10000) : 0));
}

inline Planes random_planes(size_t rows, size_t columns, double density, size_t alignment, bool prime) {
  Planes p;
  p.columns = columns;
  p.prime = prime;
  p.row_pointers.push_back(0);
  for (size_t row = 0; row < rows; ++row) {
    const double kept = row % 7 == 3 ? 0 : row % 7 == 5 ? 1 : density;
    size_t previous = 0;
    for (size_t c = 0; c < columns; ++c) {
      if (std::uniform_real_distribution<double>(0, 1)(rng) >= kept) continue;
      for (; c - previous > 255; previous += 255) add_entry(p, 255, 0);
      const int value = static_cast<int>(below(254)) - 127;
      add_entry(p, c - previous, value < 0 ? value : value + 1);
      previous = c;
    }
    while (p.values.size() % alignment) add_entry(p, 0, 0);
    p.row_pointers.push_back(static_cast<std::uint32_t>(p.values.size()));
    p.scales.push_back(0.01f + std::abs(uniform()));
  }
  p.fit();
  return p;
}

// The same matrix as a mask.
inline Planes as_mask(Planes p) {
  std::vector<std::uint8_t> mask(p.scales.size() * p.row_bytes());
  for (size_t row = 0; row < p.scales.size(); ++row) {
    size_t last = p.row_pointers[row + 1];
    while (last > p.row_pointers[row] && p.deltas[last - 1] == 0 && p.values[last - 1] == 0) --last;
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t i = 0; i < last - p.row_pointers[row]; ++i) {
      std::uint8_t& byte = mask[row * p.row_bytes() + columns[i] / 8];
      byte = static_cast<std::uint8_t>(byte | 1 << columns[i] % 8);
    }
  }
  p.deltas = mask;
  p.index = Index::kMask;
  return p;
}

// The same matrix with an entry for every column, rows padded to the alignment.
inline Planes as_dense(const Planes& p, size_t alignment) {
  Planes d;
  d.columns = p.columns;
  d.prime = p.prime;
  d.scales = p.scales;
  d.index = Index::kDense;
  const size_t stride = (p.columns + alignment - 1) / alignment * alignment;
  d.values.resize(p.scales.size() * stride);
  d.primes.resize(d.values.size());
  d.row_pointers.push_back(0);
  for (size_t row = 0; row < p.scales.size(); ++row) {
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t i = 0; i < columns.size(); ++i) {
      const size_t from = p.row_pointers[row] + i;
      if (!p.values[from]) continue;
      d.values[row * stride + columns[i]] = p.values[from];
      d.primes[row * stride + columns[i]] = p.primes[from];
    }
    d.row_pointers.push_back(static_cast<std::uint32_t>((row + 1) * stride));
  }
  d.fit();
  return d;
}

// `sorted` row pointers are valid; others are as bad as they can be.
inline Planes garbage(size_t rows, size_t columns, size_t capacity, bool sorted, bool prime, Index index) {
  Planes p;
  p.columns = columns;
  p.prime = prime;
  p.index = index;
  for (size_t i = 0; i < capacity; ++i) {
    p.values.push_back(static_cast<std::int8_t>(below(256)));
    p.primes.push_back(static_cast<std::uint16_t>(below(65536)));
  }
  const size_t index_bytes[] = {capacity, rows * p.row_bytes(), 0};
  const bool sparse = below(2) == 0;
  for (size_t i = 0; i < index_bytes[static_cast<size_t>(index)]; ++i) {
    p.deltas.push_back(static_cast<std::uint8_t>(sparse ? below(256) & below(256) & below(256) : below(256)));
  }
  for (size_t row = 0; row <= rows; ++row) {
    const size_t pointer = sorted ? below(capacity + 1) : below(std::size_t{1} << 32);
    p.row_pointers.push_back(static_cast<std::uint32_t>(pointer));
  }
  if (sorted) std::sort(p.row_pointers.begin(), p.row_pointers.end());
  p.scales.assign(rows, 0.5f);
  p.fit();
  return p;
}

struct Dense {
  std::vector<double> weights, magnitudes;
  std::vector<float> rounded;
};

inline Dense plain_decode(const Planes& p) {
  static const std::vector<std::uint32_t> primes = first_primes();
  const size_t rows = p.scales.size();
  Dense d{std::vector<double>(rows * p.columns), std::vector<double>(rows * p.columns),
          std::vector<float>(rows * p.columns)};
  for (size_t row = 0; row < rows; ++row) {
    const std::vector<size_t> columns = columns_of(p, row);
    for (size_t j = 0; j < columns.size(); ++j) {
      const size_t i = p.row_pointers[row] + j, column = columns[j];
      const size_t k = p.primes[i] < 9999 ? p.primes[i] : 9999;
      const double level = p.values[i] * (p.prime ? static_cast<double>(primes[k]) : 1.0);
      d.weights[row * p.columns + column] += level * p.scales[row];
      d.magnitudes[row * p.columns + column] += std::abs(level) * p.scales[row];
      d.rounded[row * p.columns + column] += static_cast<float>(level);
    }
    for (size_t c = 0; c < p.columns; ++c) d.rounded[row * p.columns + c] *= p.scales[row];
  }
  return d;
}

struct Bits {
  std::vector<std::uint16_t> halves;
  std::vector<float> floats;
};

// Random numbers of a type, and the same as floats.
inline Bits random_vectors(size_t count, Element element) {
  Bits b;
  for (size_t i = 0; i < count; ++i) {
    if (element == Element::kFloat32) {
      b.floats.push_back(uniform());
      continue;
    }
    // Any number of magnitude below 2, in either format.
    const auto bits = static_cast<std::uint16_t>(below(2) << 15 | below(0x4000));
    b.halves.push_back(bits);
    b.floats.push_back(element == Element::kFloat16 ? float_from_half(bits) : float_from_bfloat16(bits));
  }
  return b;
}

inline const void* data(const Bits& b) {
  return b.halves.empty() ? static_cast<const void*>(b.floats.data()) : static_cast<const void*>(b.halves.data());
}

}  // namespace upg
