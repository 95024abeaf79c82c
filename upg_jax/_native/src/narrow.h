// Values of fewer than 8 bits: a row's are unpacked, spread over their columns and multiplied by their groups'
// multipliers, a piece of the row at a time in cache.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "slabs.h"

namespace upg {
namespace {

using Eights = std::uint64_t __attribute__((vector_size(64)));

// Eight words, each with eight values in its low 8 * kBits bits, become the values with their signs in a byte each.
template <size_t kBits>
inline void spread_words(Eights& words) {
  constexpr std::uint64_t kFour = ((std::uint64_t{1} << 4 * kBits) - 1) * 0x0000000100000001;
  constexpr std::uint64_t kTwo = ((std::uint64_t{1} << 2 * kBits) - 1) * 0x0001000100010001;
  constexpr std::uint64_t kOne = ((std::uint64_t{1} << kBits) - 1) * 0x0101010101010101;
  constexpr std::uint64_t kSign = (std::uint64_t{1} << (kBits - 1)) * 0x0101010101010101, kHigh = 0x8080808080808080;
  words = (words | words << (32 - 4 * kBits)) & kFour;
  words = (words | words << (16 - 2 * kBits)) & kTwo;
  words = (words | words << (8 - kBits)) & kOne;
  words = (((words ^ kSign) | kHigh) - kSign) ^ kHigh;  // the high bits keep bytes from borrowing
}

inline std::uint64_t word_at(const std::int8_t* p) {
  std::uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// Unpacks at least entries [entry, entry + count) to `out`, which has room for 72 more; returns where the first one is.
template <size_t kBits>
inline std::int8_t* unpack(const Layer& layer, size_t entry, size_t count, std::int8_t* out) {
  const size_t bytes = value_bytes(layer), last = (entry + count + 7) / 8;
  std::int8_t* to = out;
  for (size_t i = entry / 8; i < last; i += 8, to += 64) {
    const std::int8_t* p = layer.values + i * kBits;
    std::int8_t rest[8 * kBits + 8] = {};
    if (UPG_UNLIKELY(i * kBits + sizeof rest > bytes)) {  // words are four bytes long, whatever their eight values take
      if (i * kBits < bytes) __builtin_memcpy(rest, p, bytes - i * kBits);
      p = rest;
    }
    Eights words = {word_at(p),
                    word_at(p + kBits),
                    word_at(p + 2 * kBits),
                    word_at(p + 3 * kBits),
                    word_at(p + 4 * kBits),
                    word_at(p + 5 * kBits),
                    word_at(p + 6 * kBits),
                    word_at(p + 7 * kBits)};
    spread_words<kBits>(words);
    __builtin_memcpy(to, &words, sizeof words);
  }
  return out + entry % 8;
}

inline std::int8_t* unpack(const Layer& layer, size_t entry, size_t count, std::int8_t* out) {
  return layer.value_bits == 4 ? unpack<4>(layer, entry, count, out) : unpack<3>(layer, entry, count, out);
}

// Calls `use(first column, values, columns)` for all columns of a row; behind the last column, values are 0 up to a whole
// word of 64.
template <class Isa, class Use>
inline void for_narrow_values(const Layer& layer, size_t row, Use use) {
  constexpr size_t kWords = 16, kColumns = 64 * kWords;
  alignas(64) std::int8_t unpacked[kColumns + 144];  // an expansion reads 64 values
  alignas(64) std::int8_t spread[kColumns];
  const Range e = entries_of(layer, row);
  size_t entry = e.begin;
  for (size_t first = 0; first < layer.columns; first += kColumns) {
    const size_t here = smaller(kColumns, layer.columns - first), words = (here + 63) / 64;
    prefetch_ahead(layer.values + entry * layer.value_bits / 8);
    if (layer.index == Index::kDense) {
      const size_t count = smaller(here, e.end - entry);
      std::int8_t* const values = unpack(layer, entry, count, unpacked);
      if (count < words * 64) __builtin_memset(values + count, 0, words * 64 - count);
      entry += count;
      use(first, static_cast<const std::int8_t*>(values), here);
      continue;
    }
    std::uint64_t bits[kWords];
    size_t counts[kWords], wanted = 0;
    for (size_t w = 0; w < words; ++w) {
      bits[w] = mask_word(layer, row, first / 64 + w);
      wanted += counts[w] = count_bits(bits[w]);
    }
    const size_t count = smaller(wanted, e.end - entry);
    std::int8_t* values = unpack(layer, entry, count, unpacked);
    __builtin_memset(values + count, 0, wanted - count + 64);
    for (size_t w = 0; w < words; ++w) {
      Isa::expand(bits[w], values, spread + 64 * w);
      values += counts[w];
    }
    entry += count;
    use(first, static_cast<const std::int8_t*>(spread), here);
  }
}

template <class Isa>
void decode_narrow(const Layer& layer, float* out, Range rows) {
  using Run = typename Isa::Run;
  for (size_t row = rows.begin; row < rows.end; ++row, out += layer.columns) {
    const std::uint8_t* const multipliers = layer.multipliers + row * groups_of(layer);
    const float scale = layer.scales[row];
    const typename Run::Eight scales = Run::broadcast(scale);
    for_narrow_values<Isa>(layer, row, [&](size_t first, const std::int8_t* values, size_t columns) {
      float* const at = out + first;
      for (size_t group = 0; group < columns; group += layer.group_size) {
        const float factor = multipliers[(first + group) / layer.group_size];
        const typename Run::Eight factors = Run::broadcast(factor);
        const size_t end = smaller(group + layer.group_size, columns);
        size_t c = group;
        for (; c + Isa::kRun <= end; c += Isa::kRun) {
          Run::store(at + c, Run::multiply(Run::multiply(Run::from_int8(values + c), factors), scales));
        }
        for (; c < end; ++c) at[c] = static_cast<float>(values[c]) * factor * scale;
      }
    });
  }
}

// sums[v] += levels * x[v] for the kVectors vectors from `first` on of `vectors`, which are packed by words; `sums` are a
// register's floats each.
template <class Isa, size_t kVectors>
inline void add_narrow(const Layer& layer, const std::int8_t* values, const std::uint8_t* multipliers, const float* x,
                       size_t first, size_t vectors, size_t columns, float* sums) {
  using Run = typename Isa::Run;
  constexpr size_t kChains = 32 / Isa::kRun;
  typename Run::Eight held[kVectors][kChains];
  for (size_t v = 0; v < kVectors; ++v) {
    held[v][0] = Run::load(sums + (first + v) * Isa::kRun);
    for (size_t j = 1; j < kChains; ++j) held[v][j] = Run::zero();
  }
  for (size_t group = 0; group < columns; group += layer.group_size) {
    const typename Run::Eight factor = Run::broadcast(multipliers[group / layer.group_size]);
    const size_t end = smaller(group + layer.group_size, columns);
    for (size_t c = group; c < end; c += 32) {
      const float* const word = x + (c / 64 * vectors + first) * 64 + c % 64;
      for (size_t j = 0; j < kChains; ++j) {
        const size_t at = j * Isa::kRun;
        const typename Run::Eight level = Run::multiply(Run::from_int8(values + c + at), factor);
        for (size_t v = 0; v < kVectors; ++v) {
          held[v][j] = Run::multiply_add(level, Run::load(word + v * 64 + at), held[v][j]);
        }
      }
    }
  }
  for (size_t v = 0; v < kVectors; ++v) {
    for (size_t j = 1; j < kChains; ++j) held[v][0] = Run::add(held[v][0], held[v][j]);
    Run::store(sums + (first + v) * Isa::kRun, held[v][0]);
  }
}

// y[v * rows + r] for `rows` and up to kVectorsOfWholeRows vectors, packed by words.
template <class Isa>
void product_of_narrow(const Layer& layer, const float* x, size_t vectors, float* y, Range rows) {
  using Run = typename Isa::Run;
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const std::uint8_t* const multipliers = layer.multipliers + row * groups_of(layer);
    alignas(64) float sums[kVectorsOfWholeRows * Isa::kRun] = {};
    for_narrow_values<Isa>(layer, row, [&](size_t first, const std::int8_t* values, size_t columns) {
      size_t v = 0;
      const auto add = [&](auto together) {
        for (; v + together.value <= vectors; v += together.value) {
          add_narrow<Isa, together.value>(layer, values, multipliers + first / layer.group_size, x + first * vectors, v,
                                          vectors, columns, sums);
        }
      };
      add(Constant<4>());
      add(Constant<2>());
      add(Constant<1>());
    });
    for (size_t v = 0; v < vectors; ++v) {
      y[v * layer.rows + row] = Run::sum(Run::load(sums + v * Isa::kRun)) * layer.scales[row];
    }
  }
}

}  // namespace
}  // namespace upg
