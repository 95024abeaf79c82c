// Decoding a tile of rows once, and walking it in blocks of columns.
//
// A product with many vectors reads `width` floats of packed vectors per entry. Taken row by row, each row would stream
// all of them from the second- or third-level cache. So the columns are cut into blocks whose packed vectors fit the
// first-level cache, and all rows of the tile meet one block before the next.
#pragma once

#include "kernels.h"
#include "rows.h"

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
  const auto decode = [&](RowEntries<Isa, kPrime>& entries, size_t t, size_t start) {
    w.starts[t] = static_cast<std::uint32_t>(start);
    const size_t n = entries.next(Workspace::kEntries, w.columns + start, w.levels + start);
    cut_into_blocks(w.columns + start, n, blocks, w.cuts + t * (Workspace::kBlocks + 1));
  };
  const auto most_entries = [&](size_t row) {
    const Range e = entries_of(layer, row);
    return layer.index == Index::kDelta8 ? e.end - e.begin : smaller(e.end - e.begin, layer.columns);
  };
  size_t row = begin;
  while (row < end) {
    if (most_entries(row) > Workspace::kEntries) {
      RowEntries<Isa, kPrime> entries(layer, row);
      for (bool first = true, last = false; !last; first = false) {
        decode(entries, 0, 0);
        last = entries.done();
        use(row, size_t{1}, first, last);
      }
      ++row;
      continue;
    }
    size_t rows = 0, used = 0;
    for (; row + rows < end && rows < Workspace::kRows; ++rows) {
      const size_t most = most_entries(row + rows);
      const size_t room = round_up(most, 8) + 8;
      if (most > Workspace::kEntries || used + room > Workspace::kPaddedEntries) break;
      RowEntries<Isa, kPrime> entries(layer, row + rows);
      decode(entries, rows, used);
      used += room;
    }
    use(row, rows, true, true);
    row += rows;
  }
}

}  // namespace
}  // namespace upg
