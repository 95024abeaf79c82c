// Planes that kernels may be run on, for the driver and for the fuzz target.
#pragma once

#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "execution.h"
#include "plan.h"

namespace upg {

// On the heap at their exact length, so that AddressSanitizer sees any access outside.
struct Planes {
  std::vector<std::int8_t> values;
  std::vector<std::uint8_t> deltas;  // or a mask, or nothing
  std::vector<std::uint16_t> primes;
  std::vector<float> scales;
  std::vector<std::uint32_t> row_pointers;
  size_t columns = 0;
  bool prime = false;
  Index index = Index::kDelta8;

  // To be called when all is filled in: AddressSanitizer does not see what a vector keeps for growing.
  void fit() {
    values.shrink_to_fit();
    deltas.shrink_to_fit();
    primes.shrink_to_fit();
    scales.shrink_to_fit();
    row_pointers.shrink_to_fit();
  }

  size_t rows() const { return scales.size(); }
  size_t row_bytes() const { return (columns + 63) / 64 * 8; }
  Layer layer() const {
    return {values.data(), deltas.data(), prime ? primes.data() : nullptr, scales.data(), row_pointers.data(),
            rows(),        columns,       values.size(),                   index};
  }
};

inline void run(std::unique_ptr<Plan> plan, size_t threads) {
  const auto execution = std::make_shared<Execution>(std::move(plan), threads);
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back([execution] { execution->help(); });
  execution->work();
  for (std::thread& other : others) other.join();
}

struct Products {
  std::vector<float> forward, transposed;
};

// Both products of every group with `vectors` vectors each, `x` and `g`. As in XLA's handlers, nobody runs where the result
// has no element.
inline Products multiply(const Stack& stack, const void* x, const void* g, Element element, size_t vectors, size_t threads) {
  const size_t all = stack.groups * vectors;
  Products out{std::vector<float>(all * stack.first.rows, NAN), std::vector<float>(all * stack.first.columns, NAN)};
  std::vector<float> scratch(product_scratch(stack, vectors), NAN);
  if (!out.forward.empty()) {
    run(product_plan(stack, {x, element, vectors}, out.forward.data(), scratch.data()), threads);
  }
  scratch.assign(transposed_scratch(stack, vectors), NAN);
  if (!out.transposed.empty()) {
    run(transposed_plan(stack, {g, element, vectors}, out.transposed.data(), scratch.data()), threads);
  }
  return out;
}

inline Products multiply(const Planes& p, const void* x, const void* g, Element element, size_t vectors, size_t threads) {
  const std::int32_t index = 0;
  return multiply({p.layer(), 1, &index, 1}, x, g, element, vectors, threads);
}

inline std::vector<float> decode(const Planes& p, size_t threads) {
  std::vector<float> out(p.rows() * p.columns, NAN);
  if (!out.empty()) run(decode_plan({p.layer(), 1, nullptr, 1}, out.data(), Element::kFloat32), threads);
  return out;
}

inline std::vector<std::uint16_t> decode_to_bfloat16(const Planes& p, size_t threads) {
  std::vector<std::uint16_t> out(p.rows() * p.columns);
  if (!out.empty()) run(decode_plan({p.layer(), 1, nullptr, 1}, out.data(), Element::kBFloat16), threads);
  return out;
}

// The first row of valid row pointers whose deltas reach a column outside, or how many rows there are.
inline size_t first_row_outside(const Planes& p) {
  for (size_t row = 0; row < p.rows(); ++row) {
    size_t last = 0;
    for (size_t i = p.row_pointers[row]; i < p.row_pointers[row + 1]; ++i) last += p.deltas[i];
    if (p.row_pointers[row] < p.row_pointers[row + 1] && last >= p.columns) return row;
  }
  return p.rows();
}

// The first row of valid row pointers that breaks rule 5, 6 or 7 of docs/format.md, read as they stand there.
inline size_t first_row_against_the_rules(const Planes& p) {
  for (size_t row = 0; row < p.rows(); ++row) {
    const size_t begin = p.row_pointers[row], end = p.row_pointers[row + 1];
    size_t column = 0, weight_after = 0;  // the column that the next weight must reach at least
    for (size_t i = begin; i < end; ++i) {
      column += p.deltas[i];
      if (p.prime && (p.primes[i] >= 10000 || (p.values[i] == 0 && p.primes[i] != 0))) return row;
      if (p.values[i] != 0) {
        if (column < weight_after) return row;
        weight_after = column + 1;
        continue;
      }
      bool padding = p.deltas[i] == 0;
      for (size_t j = i; j < end; ++j) padding = padding && p.values[j] == 0 && p.deltas[j] == 0;
      const bool leads_on = p.deltas[i] == 255 && i + 1 < end && p.deltas[i + 1] != 0;
      if (!padding && !leads_on) return row;
    }
  }
  return p.rows();
}

}  // namespace upg
