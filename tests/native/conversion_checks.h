// Packing, unpacking and the checks of rules, against a plain reading of docs/format.md.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "conversion.h"
#include "dispatch.h"
#include "matrices.h"
#include "verification.h"

namespace upg {

// `expect` takes a condition and what it means that it does not hold.
template <class Expect>
void check_outside(const Planes& p, const std::string& what, Expect expect) {
  expect(kernels().first_row_outside(p.layer()) == first_row_outside(p), what + ": first row outside");
}

template <class Expect>
void check_rules(const Planes& p, const std::string& what, Expect expect) {
  expect(first_bad_row(p.layer()) == first_row_against_the_rules(p), what + ": first row against the rules");
}

// Valid planes, one entry of which is anything.
template <class Expect>
void check_rules_of_mutants(Planes p, const std::string& what, Expect expect) {
  check_rules(p, what, expect);
  if (p.values.empty()) return;
  constexpr int telling[] = {0, 1, 254, 255};
  for (int i = 0; i < 20; ++i) {
    const size_t at = below(p.values.size());
    Planes mutant = p;
    if (below(2)) mutant.values[at] = static_cast<std::int8_t>(below(3) - 1);
    if (below(2)) mutant.deltas[at] = static_cast<std::uint8_t>(telling[below(4)]);
    if (below(4) == 0) mutant.primes[at] = static_cast<std::uint16_t>(9999 + below(2));
    check_rules(mutant, what, expect);
  }
}

// Packs and unpacks; `valid` planes come back as they were.
template <class Expect>
void check_conversions(const Planes& p, size_t alignment, bool valid, const std::string& what, Expect expect) {
  const size_t rows = p.scales.size(), stride = (p.columns + alignment - 1) / alignment * alignment;
  Planes mask = p, back = p;
  mask.index = Index::kMask;
  mask.deltas.assign(rows * p.row_bytes(), 0);
  back.deltas.assign(p.deltas.size(), 0);
  // Garbage may have entries before the first row and after the last one, which are nobody's.
  const size_t first = p.row_pointers[0], used = p.row_pointers[rows];
  const auto same = [&](const auto& a, const auto& b) {
    return std::equal(a.begin() + first, a.begin() + used, b.begin() + first);
  };
  const bool packed = mask_from_deltas(p.layer(), mask.deltas.data()) == rows;
  if (packed) {
    expect(first_bad_mask_row(mask.layer()) == rows, what + ": check of a mask");
    expect(deltas_from_mask(mask.layer(), back.deltas.data()) == rows && same(back.deltas, p.deltas), what + ": unpack");
  }
  if (valid) expect(packed && mask.deltas == as_mask(p).deltas, what + ": pack");
  std::vector<std::int8_t> values(rows * stride);
  std::vector<std::uint16_t> primes(rows * stride);
  const Layer layer = p.layer();
  const bool spread = dense_from_deltas(layer, stride, alignment, values.data(), primes.data()) == rows;
  if (!spread) return;
  const Layer dense = {values.data(),          nullptr, p.prime ? primes.data() : nullptr, nullptr,
                       p.row_pointers.data(), rows,    p.columns,                          values.size(),
                       Index::kDense};
  std::vector<std::uint32_t> lengths(rows);
  row_lengths_of_dense(dense, stride, alignment, lengths.data());
  for (size_t row = 0; row < rows; ++row) {
    expect(lengths[row] == p.row_pointers[row + 1] - p.row_pointers[row], what + ": lengths of rows");
  }
  back.values.assign(p.values.size(), 0);
  back.deltas.assign(p.deltas.size(), 0);
  back.primes.assign(p.primes.size(), 0);
  deltas_from_dense(dense, stride, p.row_pointers.data(), back.values.data(), back.deltas.data(),
                         back.primes.data());
  expect(same(back.values, p.values) && same(back.deltas, p.deltas) && (!p.prime || same(back.primes, p.primes)),
         what + ": dense rows back");
}

}  // namespace upg
