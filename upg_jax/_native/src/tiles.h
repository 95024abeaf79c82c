// Decoding a tile of rows once, and walking it in blocks of columns.
//
// A product with many vectors reads `width` floats of packed vectors per entry. Taken row by row, each row would stream
// all of them from the second- or third-level cache. So the columns are cut into blocks whose packed vectors fit the
// first-level cache, and all rows of the tile meet one block before the next.
#pragma once

#include "entries.h"
#include "kernels.h"

namespace upg {
namespace {

// The blocks depend on the layer only, not on the tile, so that sums do not depend on how rows were split among threads.
struct Blocks {
  unsigned shift;  // a block has 2**shift columns
  size_t count;

  Blocks(const Layer& layer, size_t width) {
    constexpr size_t kFirstLevelFloats = 16 * 1024 / sizeof(float);
    // A row's visit to a block costs a fixed time, so there should be this many multiplications to do there.
    constexpr size_t kMultiplicationsPerVisit = 2560;
    const size_t entries = layer.rows ? smaller(layer.row_pointers[layer.rows], layer.capacity) : 0;
    const auto too_few = [&](size_t columns) {
      return columns * entries < kMultiplicationsPerVisit / width * layer.rows * layer.columns;
    };
    shift = 4;
    while (shift < 31 && ((size_t{2} << shift) * width <= kFirstLevelFloats || too_few(size_t{1} << shift) ||
                          (layer.columns >> shift) >= Workspace::kBlocks)) {
      ++shift;
    }
    count = (layer.columns >> shift) + 1;
  }
};

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

// Writes to `cuts[1 .. blocks.count]` where each block's entries end, counted from the row's first.
inline void cut_into_blocks(const std::uint32_t* columns, size_t n, const Blocks& blocks, std::uint32_t* cuts) {
  for (size_t b = 0; b <= blocks.count; ++b) cuts[b] = 0;
  // First to whole groups of eight entries, by their last one: later groups overwrite earlier ones.
  const std::uint32_t groups_end = static_cast<std::uint32_t>(n & ~size_t{7});
  for (std::uint32_t i = 0; i < groups_end; i += 8) cuts[(columns[i + 7] >> blocks.shift) + 1] = i + 8;
  // Then exactly, within the group that crosses the block's end.
  std::uint32_t whole = 0;
  for (size_t b = 0; b < blocks.count; ++b) {
    if (cuts[b + 1] > whole) whole = cuts[b + 1];
    const std::uint64_t limit = std::uint64_t{b + 1} << blocks.shift;
    std::uint32_t inside = 0;
    for (std::uint32_t j = 0; j < 8; ++j) inside += columns[whole + j] < limit;
    cuts[b + 1] = whole + inside;
  }
}

// Calls `visit(row - tile's first, columns, levels, count)` for every row and block of rows [begin, end), which must
// fit the workspace.
template <class Visit>
inline void walk_blocks(size_t rows, const Blocks& blocks, const Workspace& w, Visit visit) {
  for (size_t b = 0; b < blocks.count; ++b) {
    for (size_t t = 0; t < rows; ++t) {
      const std::uint32_t* cuts = w.cuts + t * (Workspace::kBlocks + 1) + b;
      const size_t first = w.starts[t] + cuts[0];
      if (cuts[1] > cuts[0]) visit(t, w.columns + first, w.levels + first, cuts[1] - cuts[0]);
    }
  }
}

// Cuts rows [begin, end) into tiles, decodes each and calls `use(first row, rows, first, last)`. A row that does not
// fit the workspace makes several tiles of one row, of which `first` and `last` mark the ends.
template <class Isa, bool kPrime, class Use>
inline void for_tiles(const Layer& layer, size_t begin, size_t end, const Blocks& blocks, Workspace& w, Use use) {
  const auto decode = [&](size_t t, size_t start, Range e, size_t column) {
    w.starts[t] = static_cast<std::uint32_t>(start);
    const size_t n = decode_entries<Isa, kPrime>(layer, e.begin, e.end, column, w.columns + start, w.levels + start);
    cut_into_blocks(w.columns + start, n, blocks, w.cuts + t * (Workspace::kBlocks + 1));
    return n;
  };
  size_t row = begin;
  while (row < end) {
    const Range e = entries_of(layer, row);
    if (e.end - e.begin > Workspace::kEntries) {
      size_t column = 0;
      bool last = false;
      for (size_t i = e.begin; !last; i += Workspace::kEntries) {
        const Range piece = {i, smaller(e.end, i + Workspace::kEntries)};
        const size_t n = decode(0, 0, piece, column);
        if (n) column = w.columns[n - 1];
        last = piece.end == e.end || n < piece.end - piece.begin;
        use(row, size_t{1}, i == e.begin, last);
      }
      ++row;
      continue;
    }
    size_t rows = 0, used = 0;
    for (; row + rows < end && rows < Workspace::kRows; ++rows) {
      const Range next = entries_of(layer, row + rows);
      const size_t room = round_up(next.end - next.begin, 8) + 8;
      if (next.end - next.begin > Workspace::kEntries || used + room > Workspace::kPaddedEntries) break;
      decode(rows, used, next, 0);
      used += room;
    }
    use(row, rows, true, true);
    row += rows;
  }
}

}  // namespace
}  // namespace upg
