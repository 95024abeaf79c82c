// Values of fewer than 8 bits against a plain loop over the entries, on valid planes and on garbage.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "planes.h"

namespace upg {

// Planes of exactly their size, so that sanitizers see reads past any end.
struct NarrowPlanes {
  Planes planes;
  std::vector<std::uint8_t> multipliers;
  size_t bits;
  size_t group_size;
  size_t capacity;

  Layer layer() const {
    Layer layer = planes.layer();
    layer.capacity = capacity;
    layer.value_bits = bits;
    layer.group_size = group_size;
    layer.multipliers = multipliers.data();
    return layer;
  }

  int value(size_t entry) const {
    int found = 0;
    for (size_t j = 0; j < bits; ++j) {
      const size_t bit = entry * bits + j;
      found |= (planes.values[bit / 8] >> bit % 8 & 1) << j;
    }
    return found >= 1 << (bits - 1) ? found - (1 << bits) : found;
  }
};

// `sorted` row pointers are inside the planes; others are as bad as they can be.
inline NarrowPlanes narrow_planes(size_t number, bool sorted, std::mt19937& random) {
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  constexpr size_t shapes[][2] = {{1, 1}, {3, 40}, {5, 160}, {4, 1111}, {2, 2500}};
  const size_t rows = shapes[number % 5][0], columns = shapes[number % 5][1];
  NarrowPlanes n{{}, {}, number % 2 ? size_t{3} : size_t{4}, size_t{32} << number % 3, 8 * below(rows * columns / 8 + 2)};
  n.planes.columns = columns;
  n.planes.index = number / 2 % 2 ? Index::kMask : Index::kDense;
  n.planes.values.resize(n.capacity * n.bits / 8);
  for (std::int8_t& value : n.planes.values) value = static_cast<std::int8_t>(below(256));
  n.planes.deltas.resize(n.planes.index == Index::kMask ? rows * n.planes.row_bytes() : 0);
  for (std::uint8_t& byte : n.planes.deltas) byte = static_cast<std::uint8_t>(below(256) & below(256));
  n.multipliers.resize(rows * ((columns + n.group_size - 1) / n.group_size));
  for (std::uint8_t& m : n.multipliers) m = static_cast<std::uint8_t>(below(256));
  for (size_t row = 0; row <= rows; ++row) {
    n.planes.row_pointers.push_back(static_cast<std::uint32_t>(sorted ? below(n.capacity + 1) : below(size_t{1} << 32)));
  }
  if (sorted) std::sort(n.planes.row_pointers.begin(), n.planes.row_pointers.end());
  n.planes.scales.assign(rows, 0.5f);
  n.planes.fit();
  return n;
}

inline std::vector<float> plain_levels(const NarrowPlanes& n) {
  const size_t rows = n.planes.rows(), columns = n.planes.columns, groups = n.multipliers.size() / rows;
  std::vector<float> levels(rows * columns);
  for (size_t row = 0; row < rows; ++row) {
    size_t entry = n.planes.row_pointers[row];
    for (size_t c = 0; c < columns && entry < n.planes.row_pointers[row + 1]; ++c) {
      const bool stored =
          n.planes.index == Index::kDense || n.planes.deltas[row * n.planes.row_bytes() + c / 8] >> c % 8 & 1;
      if (!stored) continue;
      levels[row * columns + c] = static_cast<float>(n.value(entry++) * n.multipliers[row * groups + c / n.group_size]);
    }
  }
  return levels;
}

template <class Expect>
void check_narrow(size_t number, Expect expect) {
  std::mt19937 random(static_cast<unsigned>(number));
  for (const bool sorted : {true, false}) {
    const NarrowPlanes n = narrow_planes(number, sorted, random);
    const std::string name = std::string(kernels().name) + " narrow " + std::to_string(number);
    const size_t rows = n.planes.rows(), columns = n.planes.columns, vectors = 1 + number % kVectorsOfWholeRows;
    const std::int32_t index = 0;
    const Stack stack{n.layer(), 1, &index, 1};
    std::vector<float> decoded(rows * columns, NAN), y(vectors * rows, NAN), x(vectors * columns);
    for (float& element : x) element = std::uniform_real_distribution<float>(-1, 1)(random);
    std::vector<float> scratch(product_scratch(stack, vectors), NAN);
    run(decode_plan(stack, decoded.data(), Element::kFloat32), 2);
    run(product_plan(stack, {x.data(), Element::kFloat32, vectors}, y.data(), scratch.data()), 2);
    if (!sorted) continue;
    const std::vector<float> levels = plain_levels(n);
    for (size_t i = 0; i < levels.size(); ++i) expect(decoded[i] == levels[i] * 0.5f, name + " decoded");
    for (size_t v = 0; v < vectors; ++v) {
      for (size_t row = 0; row < rows; ++row) {
        double sum = 0, magnitude = 0;
        for (size_t c = 0; c < columns; ++c) {
          const double term = 0.5 * static_cast<double>(levels[row * columns + c]) * static_cast<double>(x[v * columns + c]);
          sum += term;
          magnitude += std::abs(term);
        }
        const double bound = 2 * static_cast<double>(columns + 2) * std::ldexp(magnitude, -24) + 1e-30;
        expect(std::abs(static_cast<double>(y[v * rows + row]) - sum) <= bound, name + " product");
      }
    }
  }
}

}  // namespace upg
