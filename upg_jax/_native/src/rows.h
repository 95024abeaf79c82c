// Reading rows of any index: as columns and levels, or, of a mask or a dense row, as values by column.
#pragma once

#include "entries.h"

namespace upg {
namespace {

// The bits of 64 columns, none outside the matrix.
inline std::uint64_t mask_word(const Layer& layer, size_t row, size_t word) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, layer.deltas + (row * words_of(layer) + word) * 8, sizeof bits);
  const size_t beyond = layer.columns - word * 64;
  return beyond < 64 ? bits & ((std::uint64_t{1} << beyond) - 1) : bits;
}

inline size_t count_bits(std::uint64_t bits) { return static_cast<size_t>(__builtin_popcountll(bits)); }

// Reads a row's values 64 columns at a time, 0 where there is no entry. Bits beyond the row's entries have none; what
// follows the last column is anything.
template <class Isa>
class RowWords {
 public:
  RowWords() = default;
  RowWords(const Layer& layer, size_t row) {
    const Range e = entries_of(layer, row);
    entry_ = e.begin;
    end_ = e.end;
    if (layer.index == Index::kMask) mask_ = layer.deltas + row * words_of(layer) * 8;
  }

  // The values of the next 64 columns, in `buffer` or in the plane itself.
  const std::int8_t* next(const Layer& layer, std::int8_t* buffer) {
    return layer.index == Index::kDense ? next<true>(layer, buffer) : next<false>(layer, buffer);
  }

  template <bool kDense>
  const std::int8_t* next(const Layer& layer, std::int8_t* buffer) {
    const std::int8_t* values = layer.values + entry_;
    const size_t left = end_ - entry_;
    prefetch_ahead(values);
    if constexpr (kDense) {
      entry_ += smaller(left, 64);
      return UPG_UNLIKELY(left < 64) ? copy(values, left, buffer) : values;
    } else {
      std::uint64_t bits;
      __builtin_memcpy(&bits, mask_, sizeof bits);
      mask_ += sizeof bits;
      size_t count = count_bits(bits);
      alignas(64) std::int8_t last[64];
      if (UPG_UNLIKELY(entry_ + 64 > layer.capacity || count > left)) {
        count = smaller(count, left);
        values = copy(values, count, last);
      }
      Isa::expand(bits, values, buffer);
      entry_ += count;
      return buffer;
    }
  }

 private:
  // `count` values, then zeros. Out of line, or it would take the loops' registers.
  __attribute__((noinline)) static const std::int8_t* copy(const std::int8_t* values, size_t count, std::int8_t* out) {
    if (count) __builtin_memcpy(out, values, count);
    __builtin_memset(out + count, 0, 64 - count);
    return out;
  }

  const std::uint8_t* mask_ = nullptr;
  size_t entry_ = 0;
  size_t end_ = 0;
};

template <class Isa>
inline size_t columns_of_bits(std::uint64_t bits, size_t first, std::uint32_t* columns) {
  if constexpr (Isa::kRun == 16) return Isa::columns_of_bits(bits, first, columns);
  size_t n = 0;
  for (; bits; bits &= bits - 1) {
    columns[n++] = static_cast<std::uint32_t>(first + static_cast<size_t>(__builtin_ctzll(bits)));
  }
  return n;
}

// Decodes entries [begin, end) of a row, the first of which counts from `column`. Writes groups of eight and, behind
// the last entry inside the matrix, eight columns beyond it; returns how many entries that are.
template <class Isa, bool kPrime>
inline size_t decode_entries(const Layer& layer, size_t begin, size_t end, size_t column, std::uint32_t* columns,
                             float* levels) {
  std::uint32_t last = static_cast<std::uint32_t>(column);
  size_t n = 0;
  for (size_t i = begin; i < end && last < layer.columns; i += 8, n += 8) {
    if (i + 8 <= end) {
      last = Isa::running_columns(layer.deltas + i, last, columns + n);
      Isa::store(levels + n, levels_of<Isa, kPrime>(layer.values + i, primes_at<kPrime>(layer, i)));
    } else {
      const Tail tail(layer, i, end - i);
      last = Isa::running_columns(tail.deltas, last, columns + n);
      Isa::store(levels + n, levels_of<Isa, kPrime>(tail.values, tail.primes));
    }
  }
  n = smaller(n, end - begin);
  // Columns never fall along a row, so the first one outside the matrix ends it.
  while (n > 0 && UPG_UNLIKELY(columns[n - 1] >= layer.columns)) --n;
  for (size_t j = 0; j < 8; ++j) columns[n + j] = ~std::uint32_t{0};
  return n;
}

// Reads a row's entries in pieces, as columns and levels, whatever its index.
template <class Isa, bool kPrime>
class RowEntries {
 public:
  RowEntries(const Layer& layer, size_t row) : layer_(layer), row_(row) {
    const Range e = entries_of(layer, row);
    entry_ = e.begin;
    end_ = e.end;
  }

  bool done() const {
    return entry_ >= end_ || (layer_.index != Index::kDelta8 && place_ >= round_up(layer_.columns, 64));
  }

  // Decodes at most `limit` more entries, a multiple of 64, and returns how many. Writes whole groups of eight and,
  // behind the last entry inside the matrix, eight columns beyond it.
  size_t next(size_t limit, std::uint32_t* columns, float* levels) {
    size_t n = 0;
    if (layer_.index == Index::kDelta8) {
      const size_t piece = smaller(limit, end_ - entry_);
      n = decode_entries<Isa, kPrime>(layer_, entry_, entry_ + piece, place_, columns, levels);
      entry_ = n < piece ? end_ : entry_ + piece;
      if (n) place_ = columns[n - 1];
      return n;
    }
    if (layer_.index == Index::kDense) {
      n = smaller(smaller(limit, end_ - entry_), layer_.columns - place_);
      for (size_t i = 0; i < n; ++i) columns[i] = static_cast<std::uint32_t>(place_ + i);
      place_ = n < limit ? round_up(layer_.columns, 64) : place_ + n;
    } else {
      for (; place_ < layer_.columns; place_ += 64) {
        const std::uint64_t bits = mask_word(layer_, row_, place_ / 64);
        const size_t count = count_bits(bits), left = end_ - entry_ - n;
        if (n + count > limit) break;
        if (UPG_UNLIKELY(count > left)) {
          std::uint32_t more[72];
          columns_of_bits<Isa>(bits, place_, more);
          for (size_t i = 0; i < left; ++i) columns[n++] = more[i];
          place_ = layer_.columns;
          break;
        }
        n += columns_of_bits<Isa>(bits, place_, columns + n);
      }
      if (place_ >= layer_.columns) place_ = round_up(layer_.columns, 64);
    }
    for (size_t i = 0; i < n; i += 8) {
      if (entry_ + i + 8 <= layer_.capacity) {
        Isa::store(levels + i, levels_of<Isa, kPrime>(layer_.values + entry_ + i, primes_at<kPrime>(layer_, entry_ + i)));
      } else {
        const Tail tail(layer_, entry_ + i, n - i);
        Isa::store(levels + i, levels_of<Isa, kPrime>(tail.values, tail.primes));
      }
    }
    for (size_t j = 0; j < 8; ++j) columns[n + j] = ~std::uint32_t{0};
    entry_ += n;
    return n;
  }

 private:
  const Layer& layer_;
  size_t row_;
  size_t entry_;
  size_t end_;
  size_t place_ = 0;  // with deltas the column of the last entry, else the column to read next
};

// Calls `use(columns, levels, count)` for all entries of a row, some hundred at a time.
template <class Isa, bool kPrime, class Use>
inline void for_row_entries(const Layer& layer, size_t row, Use use) {
  constexpr size_t kPiece = 512;
  std::uint32_t columns[kPiece + 16];
  float levels[kPiece + 16];
  RowEntries<Isa, kPrime> entries(layer, row);
  while (!entries.done()) {
    const size_t n = entries.next(kPiece, columns, levels);
    use(static_cast<const std::uint32_t*>(columns), static_cast<const float*>(levels), n);
  }
}

// Calls `use(first column, values, columns)` for all columns of a row, a word at a time.
template <class Isa, class Use>
inline void for_row_values(const Layer& layer, size_t row, Use use) {
  RowWords<Isa> values(layer, row);
  alignas(64) std::int8_t buffer[64];
  for (size_t c = 0; c < layer.columns; c += 64) use(c, values.next(layer, buffer), smaller(64, layer.columns - c));
}

}  // namespace
}  // namespace upg
