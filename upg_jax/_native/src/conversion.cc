#include "conversion.h"

#include <cstring>

namespace upg {
namespace {

constexpr size_t kMaxDelta = 255;

std::uint64_t word_at(const Layer& layer, size_t row, size_t word) {
  std::uint64_t bits;
  std::memcpy(&bits, layer.deltas + (row * words_of(layer) + word) * 8, sizeof bits);
  return bits;
}

size_t count_bits(std::uint64_t bits) { return static_cast<size_t>(__builtin_popcountll(bits)); }

// Entries that bridge the gap to an entry `delta` columns on.
size_t fillers_in(size_t delta) { return delta ? (delta - 1) / kMaxDelta : 0; }

// Which of up to 64 values are not zero, a bit each; of eight at once, whose bits are then multiplied to one place.
std::uint64_t weights_in(const std::int8_t* values, size_t count) {
  std::uint64_t bits = 0;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    constexpr std::uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
    std::uint64_t eight;
    std::memcpy(&eight, values + i, sizeof eight);
    const std::uint64_t weights = (((eight & kLow) + kLow) | eight) >> 7 & 0x0101010101010101;
    bits |= (weights * 0x0102040810204080 >> 56) << i;
  }
  for (; i < count; ++i) bits |= std::uint64_t{values[i] != 0} << i;
  return bits;
}

// Where a row's end padding begins.
size_t end_of_entries(const Layer& layer, Range e) {
  while (e.end > e.begin && layer.values[e.end - 1] == 0 && layer.deltas[e.end - 1] == 0) --e.end;
  return e.end;
}

}  // namespace

size_t first_bad_mask_row(const Layer& layer, Range rows) {
  const size_t words = words_of(layer), beyond = words * 64 - layer.columns;
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    size_t bits = 0;
    for (size_t w = 0; w < words; ++w) bits += count_bits(word_at(layer, row, w));
    if (bits > e.end - e.begin) return row;
    if (beyond && word_at(layer, row, words - 1) >> (64 - beyond)) return row;
  }
  return rows.end;
}

size_t mask_from_deltas(const Layer& layer, Range rows, std::uint8_t* mask) {
  const size_t words = words_of(layer);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const size_t end = end_of_entries(layer, e);
    std::uint8_t* const out = mask + row * words * 8;
    size_t column = 0, word = 0;
    std::uint64_t bits = 0;
    for (size_t i = e.begin; i < end; ++i) {
      const size_t delta = layer.deltas[i];
      column += delta;
      if ((delta == 0 && i > e.begin) || column >= layer.columns) return row;
      if (column / 64 != word) {
        std::memcpy(out + word * 8, &bits, sizeof bits);
        // A delta skips at most four words.
        for (++word, bits = 0; word < column / 64; ++word) std::memcpy(out + word * 8, &bits, sizeof bits);
      }
      bits |= std::uint64_t{1} << column % 64;
    }
    for (; word < words; ++word, bits = 0) std::memcpy(out + word * 8, &bits, sizeof bits);
  }
  return rows.end;
}

size_t deltas_from_mask(const Layer& layer, Range rows, std::uint8_t* deltas) {
  const size_t words = words_of(layer);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    size_t entry = e.begin, previous = 0;
    for (size_t w = 0; w < words; ++w) {
      for (std::uint64_t bits = word_at(layer, row, w); bits; bits &= bits - 1) {
        const size_t column = w * 64 + static_cast<size_t>(__builtin_ctzll(bits));
        if (entry == e.end || column - previous > kMaxDelta) return row;
        deltas[entry++] = static_cast<std::uint8_t>(column - previous);
        previous = column;
      }
    }
  }
  return rows.end;
}

size_t dense_from_deltas(const Layer& layer, Range rows, size_t stride, size_t alignment, std::int8_t* values,
                         std::uint16_t* primes) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const size_t end = end_of_entries(layer, e);
    if (round_up(end - e.begin, alignment) != e.end - e.begin) return row;
    size_t column = 0;
    bool bridging = true;  // the previous entry was a filler, or there is none
    for (size_t i = e.begin; i < e.end; ++i) {
      const size_t delta = layer.deltas[i];
      const std::int8_t value = layer.values[i];
      if (layer.primes && value == 0 && layer.primes[i] != 0) return row;
      if (i >= end) continue;
      column += delta;
      if ((delta == 0 && i > e.begin) || column >= layer.columns) return row;
      if (value == 0 && delta != kMaxDelta) return row;
      values[row * stride + column] = value;
      if (layer.primes) primes[row * stride + column] = layer.primes[i];
      bridging = value == 0;
    }
    if (end > e.begin && bridging) return row;
  }
  return rows.end;
}

void row_lengths_of_dense(const Layer& layer, Range rows, size_t stride, size_t alignment, std::uint32_t* lengths) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const std::int8_t* const values = layer.values + row * stride;
    size_t entries = 0, previous = 0;
    for (size_t c = 0; c < layer.columns; c += 64) {
      const std::uint64_t bits = weights_in(values + c, smaller(64, layer.columns - c));
      if (bits == 0) continue;
      // Only the first weight of a word may be far from the one before.
      entries += count_bits(bits) + fillers_in(c + static_cast<size_t>(__builtin_ctzll(bits)) - previous);
      previous = c + 63 - static_cast<size_t>(__builtin_clzll(bits));
    }
    lengths[row] = static_cast<std::uint32_t>(round_up(entries, alignment));
  }
}

void deltas_from_dense(const Layer& layer, Range rows, size_t stride, const std::uint32_t* row_pointers,
                       std::int8_t* values, std::uint8_t* deltas, std::uint16_t* primes) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    size_t entry = row_pointers[row], previous = 0;
    for (size_t word = 0; word < layer.columns; word += 64) {
      const size_t first = row * stride + word;
      std::uint64_t bits = weights_in(layer.values + first, smaller(64, layer.columns - word));
      for (; bits; bits &= bits - 1) {
        const auto bit = static_cast<size_t>(__builtin_ctzll(bits));
        size_t delta = word + bit - previous;
        for (; delta > kMaxDelta; delta -= kMaxDelta) deltas[entry++] = kMaxDelta;
        values[entry] = layer.values[first + bit];
        if (layer.primes) primes[entry] = layer.primes[first + bit];
        deltas[entry++] = static_cast<std::uint8_t>(delta);
        previous = word + bit;
      }
    }
  }
}

}  // namespace upg
