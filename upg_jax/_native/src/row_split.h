// Cutting a layer's rows into pieces of about equal work.
#pragma once

#include "layer.h"

namespace upg {

class RowSplit {
 public:
  // An empty row counts as this many entries.
  static constexpr size_t kRowWeight = 8;

  // For every layer of a stack the same number of pieces, sized by the planes' length: what a shorter layer does not
  // fill is empty.
  RowSplit(const Layer& layer, size_t pieces) : pieces_(pieces), weight_(work(layer) / pieces + 1) {}

  static size_t work(const Layer& layer) { return layer.capacity + kRowWeight * layer.rows; }

  size_t pieces() const { return pieces_; }

  Range rows(const Layer& layer, size_t piece) const {
    return {first_row(layer, piece), piece + 1 == pieces_ ? layer.rows : first_row(layer, piece + 1)};
  }

 private:
  // The first row that begins at or after the piece's share.
  size_t first_row(const Layer& layer, size_t piece) const {
    const size_t target = piece * weight_;
    size_t low = 0, high = layer.rows;
    while (low < high) {
      const size_t middle = low + (high - low) / 2;
      const size_t before = smaller(layer.row_pointers[middle], layer.capacity) + kRowWeight * middle;
      if (before < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  size_t pieces_;
  size_t weight_;
};

}  // namespace upg
