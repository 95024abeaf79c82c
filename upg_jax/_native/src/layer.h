// What the kernels work on: a view of one compressed matrix (docs/format.md, section 1).
//
// Everything here has internal linkage. The kernels are compiled once per instruction set, and an inline function
// that the linker merged across those files could bring AVX-512 code to a machine without it. For the same reason
// the kernel headers use no templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

// For what an inner loop does at every entry, which a call would take longer than.
#define UPG_INLINE __attribute__((always_inline)) inline

namespace upg {

using std::size_t;

// How an entry finds its column; the numbers are part of compiled programs.
enum class Index : std::int32_t { kDelta8 = 0, kMask = 1, kDense = 2 };

struct Layer {
  const std::int8_t* values;
  const std::uint8_t* deltas;  // or a mask, or nothing
  const std::uint16_t* primes;  // null on the unit manifold
  const float* scales;
  const std::uint32_t* row_pointers;
  size_t rows;
  size_t columns;
  size_t capacity;  // entries of the planes
  Index index = Index::kDelta8;
  // With fewer than 8 bits `values` is a stream of capacity * value_bits / 8 bytes, and every `group_size` columns of a row
  // share a multiplier; the index is then a mask, or dense.
  size_t value_bits = 8;
  size_t group_size = 0;
  const std::uint8_t* multipliers = nullptr;
};

enum class Element { kFloat32, kBFloat16, kFloat16 };

struct Range {
  size_t begin;
  size_t end;
};

static constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
static constexpr size_t larger(size_t a, size_t b) { return a < b ? b : a; }
static inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Words of 64 columns, of which a row's mask has one bit each.
static inline size_t words_of(const Layer& layer) { return (layer.columns + 63) / 64; }

static inline size_t value_bytes(const Layer& layer) { return layer.capacity * layer.value_bits / 8; }

// Multipliers of a row.
static inline size_t groups_of(const Layer& layer) {
  return layer.group_size ? (layer.columns + layer.group_size - 1) / layer.group_size : 0;
}

// Length of one layer's `deltas`.
static inline size_t index_bytes(const Layer& layer) {
  if (layer.index == Index::kMask) return layer.rows * words_of(layer) * 8;
  return layer.index == Index::kDelta8 ? layer.capacity : 0;
}

// The entries of a row, inside the planes whatever the row pointers say.
static inline Range entries_of(const Layer& layer, size_t row) {
  const size_t begin = smaller(layer.row_pointers[row], layer.capacity);
  const size_t end = smaller(layer.row_pointers[row + 1], layer.capacity);
  return {begin, larger(begin, end)};
}

}  // namespace upg
