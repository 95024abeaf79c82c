// Reading entries eight at a time: columns from deltas, levels from values and prime indices.
#pragma once

#include "layer.h"
#include "primes.h"

namespace upg {
namespace {

#define UPG_UNLIKELY(condition) __builtin_expect(!!(condition), 0)

// Asks for memory that is read about a microsecond later; any address is allowed. The processor prefetches by itself, but
// begins anew in every page, and a page whose address it has yet to translate costs most of all, as
// products of matrices that no cache holds show.
inline void prefetch_ahead(const void* p) {
  constexpr std::uintptr_t kBytes = 2048;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + kBytes));
}

// The same for `count` entries from `entry` on, at most a cache line of values.
template <bool kPrime>
inline void prefetch_entries(const Layer& layer, size_t entry, size_t count) {
  prefetch_ahead(layer.values + entry);
  prefetch_ahead(layer.deltas + entry);
  if constexpr (kPrime) {
    prefetch_ahead(layer.primes + entry);
    if (count > 32) prefetch_ahead(layer.primes + entry + 32);
  }
}

// Up to seven entries of a row's end, followed by entries of value 0 and delta 0.
struct Tail {
  alignas(16) std::uint16_t primes[8] = {};
  std::int8_t values[8] = {};
  std::uint8_t deltas[8] = {};

  Tail(const Layer& layer, size_t entry, size_t count) {
    if (layer.capacity - entry >= 8) {
      const std::uint64_t kept = (std::uint64_t{1} << (8 * count)) - 1;
      copy_bytes(values, layer.values + entry, kept);
      if (layer.index == Index::kDelta8) copy_bytes(deltas, layer.deltas + entry, kept);
      if (layer.primes) __builtin_memcpy(primes, layer.primes + entry, sizeof primes);
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      values[i] = layer.values[entry + i];
      if (layer.index == Index::kDelta8) deltas[i] = layer.deltas[entry + i];
      if (layer.primes) primes[i] = layer.primes[entry + i];
    }
  }

 private:
  static void copy_bytes(void* to, const void* from, std::uint64_t kept) {
    std::uint64_t word;
    __builtin_memcpy(&word, from, sizeof word);
    word &= kept;
    __builtin_memcpy(to, &word, sizeof word);
  }
};

// Adding up deltas is a chain of eight additions, one cycle each. That is not what limits the kernels, and shorter
// prefix sums by shuffles or multiplication measured slower. What limits them on the prime manifold is loads, of which
// one word makes fewer than eight bytes do; on the unit manifold it is instructions, and shifting a word takes more.
template <bool kPrime>
UPG_INLINE void columns_of(const std::uint8_t* deltas, size_t column, size_t* c) {
  if constexpr (kPrime) {
    std::uint64_t word;
    __builtin_memcpy(&word, deltas, sizeof word);
    c[0] = column + (word & 255);
    c[1] = c[0] + ((word >> 8) & 255);
    c[2] = c[1] + ((word >> 16) & 255);
    c[3] = c[2] + ((word >> 24) & 255);
    c[4] = c[3] + ((word >> 32) & 255);
    c[5] = c[4] + ((word >> 40) & 255);
    c[6] = c[5] + ((word >> 48) & 255);
    c[7] = c[6] + (word >> 56);
  } else {
    c[0] = column + deltas[0];
    for (size_t j = 1; j < 8; ++j) c[j] = c[j - 1] + deltas[j];
  }
}

// Exact: |q * P[k]| < 2**24.
template <class Isa, bool kPrime>
UPG_INLINE typename Isa::Eight levels_of(const std::int8_t* q, const std::uint16_t* k) {
  const typename Isa::Eight values = Isa::from_int8(q);
  if constexpr (kPrime) return Isa::multiply(values, Isa::primes(k));
  return values;
}

// The prime indices from `entry` on, where there are any.
template <bool kPrime>
inline const std::uint16_t* primes_at(const Layer& layer, size_t entry) {
  if constexpr (kPrime) return layer.primes + entry;
  return nullptr;
}

template <bool kPrime>
inline float level_of(std::int8_t q, const std::uint16_t* k) {
  if constexpr (!kPrime) return q;
  const std::int32_t high = *k >= kFirstPrimeAbove16Bits ? 65536 : 0;
  return static_cast<float>(q * (high + kPrimeLowHalves[*k]));
}

// Calls `use(columns, values, primes)` for entries [begin, end) of a row, eight at a time, the last ones padded with
// entries of level 0. Columns rise along a row, so the first one outside the matrix ends it: `use_one(column, value,
// prime)` is then called for the entries before. `columns` are inside the matrix, whatever the planes hold.
template <bool kPrime, class Use, class UseOne>
inline void for_entries(const Layer& layer, size_t begin, size_t end, size_t column, Use use, UseOne use_one) {
  size_t c[8];
  for (size_t i = begin; i < end; i += 8) {
    const std::int8_t* q = layer.values + i;
    const std::uint8_t* d = layer.deltas + i;
    const std::uint16_t* k = primes_at<kPrime>(layer, i);
    if (i + 8 <= end) {
      columns_of<kPrime>(d, column, c);
      if (UPG_UNLIKELY(c[7] >= layer.columns)) {
        for (size_t j = 0; c[j] < layer.columns; ++j) use_one(c[j], q[j], primes_at<kPrime>(layer, i + j));
        return;
      }
      use(c, q, k);
      column = c[7];
    } else {
      const Tail tail(layer, i, end - i);
      columns_of<kPrime>(tail.deltas, column, c);
      if (UPG_UNLIKELY(c[7] >= layer.columns)) {
        for (size_t j = 0; c[j] < layer.columns; ++j) use_one(c[j], tail.values[j], tail.primes + j);
        return;
      }
      use(c, tail.values, tail.primes);
    }
  }
}

}  // namespace
}  // namespace upg
