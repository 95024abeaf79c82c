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

inline Range all_rows(const Planes& p) { return {0, p.rows()}; }

// `expect` takes a condition and what it means that it does not hold.
template <class Expect>
void check_outside(const Planes& p, const std::string& what, Expect expect) {
  expect(kernels().first_row_outside(p.layer()) == first_row_outside(p), what + ": first row outside");
}

template <class Expect>
void check_rules(const Planes& p, const std::string& what, Expect expect) {
  expect(first_bad_row(p.layer(), all_rows(p)) == first_row_against_the_rules(p), what + ": first row against the rules");
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
  const bool packed = mask_from_deltas(p.layer(), all_rows(p), mask.deltas.data()) == rows;
  if (packed) {
    expect(first_bad_mask_row(mask.layer(), all_rows(p)) == rows, what + ": check of a mask");
    expect(deltas_from_mask(mask.layer(), all_rows(p), back.deltas.data()) == rows && same(back.deltas, p.deltas), what + ": unpack");
  }
  if (valid) expect(packed && mask.deltas == as_mask(p).deltas, what + ": pack");
  std::vector<std::int8_t> values(rows * stride);
  std::vector<std::uint16_t> primes(rows * stride);
  const Layer layer = p.layer();
  const bool spread = dense_from_deltas(layer, all_rows(p), stride, alignment, values.data(), primes.data()) == rows;
  if (!spread) return;
  const Layer dense = {values.data(),          nullptr, p.prime ? primes.data() : nullptr, nullptr,
                       p.row_pointers.data(), rows,    p.columns,                          values.size(),
                       Index::kDense};
  std::vector<std::uint32_t> lengths(rows);
  row_lengths_of_dense(dense, all_rows(p), stride, alignment, lengths.data());
  for (size_t row = 0; row < rows; ++row) {
    expect(lengths[row] == p.row_pointers[row + 1] - p.row_pointers[row], what + ": lengths of rows");
  }
  back.values.assign(p.values.size(), 0);
  back.deltas.assign(p.deltas.size(), 0);
  back.primes.assign(p.primes.size(), 0);
  deltas_from_dense(dense, all_rows(p), stride, p.row_pointers.data(), back.values.data(), back.deltas.data(),
                         back.primes.data());
  expect(same(back.values, p.values) && same(back.deltas, p.deltas) && (!p.prime || same(back.primes, p.primes)),
         what + ": dense rows back");
}

// The first row of valid row pointers with more bits than entries, or with a bit outside, or how many rows there are.
inline size_t first_bad_mask_row_as_read(const Planes& p) {
  for (size_t row = 0; row < p.rows(); ++row) {
    size_t bits = 0;
    for (size_t c = 0; c < p.row_bytes() * 8; ++c) {
      if (!(p.deltas[row * p.row_bytes() + c / 8] >> c % 8 & 1)) continue;
      if (c >= p.columns || ++bits > p.row_pointers[row + 1] - p.row_pointers[row]) return row;
    }
  }
  return p.rows();
}

// Anything as a mask, with valid row pointers: its check, and the deltas of the rows before the first that has none.
template <class Expect>
void check_mask(const Planes& p, const std::string& what, Expect expect) {
  expect(first_bad_mask_row(p.layer(), all_rows(p)) == first_bad_mask_row_as_read(p), what + ": first bad row of a mask");
  std::vector<std::uint8_t> deltas(p.values.size()), as_read(p.values.size());
  const size_t unpacked = deltas_from_mask(p.layer(), all_rows(p), deltas.data());
  for (size_t row = 0; row < p.rows(); ++row) {
    size_t entry = p.row_pointers[row], previous = 0;
    for (size_t c = 0; c < p.row_bytes() * 8; ++c) {
      if (!(p.deltas[row * p.row_bytes() + c / 8] >> c % 8 & 1)) continue;
      if (entry == p.row_pointers[row + 1] || c - previous > 255) {
        expect(unpacked == row, what + ": first row of a mask without deltas");
        return;
      }
      as_read[entry++] = static_cast<std::uint8_t>(c - previous);
      previous = c;
    }
    const auto end = as_read.begin() + static_cast<std::ptrdiff_t>(entry);
    expect(unpacked > row && std::equal(as_read.begin(), end, deltas.begin()), what + ": deltas of a mask");
  }
  expect(unpacked == p.rows(), what + ": a mask has deltas");
}

// Anything as the values and primes of dense rows: what is made of them is valid, holds them, and comes back.
template <class Expect>
void check_dense_rows(Planes p, size_t alignment, const std::string& what, Expect expect) {
  const size_t rows = p.rows(), stride = (p.columns + alignment - 1) / alignment * alignment;
  p.index = Index::kDense;
  p.values.resize(rows * stride);
  p.primes.resize(rows * stride);
  for (size_t i = 0; i < p.values.size(); ++i) {
    if (i % stride >= p.columns) p.values[i] = 0;
    p.primes[i] = static_cast<std::uint16_t>(p.values[i] ? p.primes[i] % 10000 : 0);
  }
  p.fit();
  std::vector<std::uint32_t> lengths(rows);
  row_lengths_of_dense(p.layer(), all_rows(p), stride, alignment, lengths.data());
  Planes sparse;
  sparse.columns = p.columns, sparse.prime = p.prime, sparse.scales = p.scales, sparse.row_pointers = {0};
  for (const std::uint32_t n : lengths) sparse.row_pointers.push_back(sparse.row_pointers.back() + n);
  sparse.values.resize(sparse.row_pointers.back());
  sparse.deltas.resize(sparse.values.size());
  sparse.primes.resize(sparse.values.size());
  sparse.fit();
  deltas_from_dense(p.layer(), all_rows(p), stride, sparse.row_pointers.data(), sparse.values.data(), sparse.deltas.data(),
                    sparse.primes.data());
  expect(first_row_outside(sparse) == rows && first_row_against_the_rules(sparse) == rows, what + ": valid deltas");
  std::vector<std::int8_t> values(rows * stride);
  std::vector<std::uint16_t> primes(rows * stride);
  for (size_t row = 0; row < rows; ++row) {
    const std::vector<size_t> columns = columns_of(sparse, row);
    for (size_t i = 0; i < columns.size(); ++i) {
      const size_t from = sparse.row_pointers[row] + i, to = row * stride + columns[i];
      if (sparse.values[from]) values[to] = sparse.values[from], primes[to] = sparse.primes[from];
    }
  }
  expect(values == p.values && (!p.prime || primes == p.primes), what + ": deltas of dense rows");
  check_conversions(sparse, alignment, true, what, expect);
}

}  // namespace upg
