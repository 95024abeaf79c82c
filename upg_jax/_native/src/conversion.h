// Between the three forms of a layer's index. Plain loops over rows of entries.
#pragma once

#include "layer.h"

namespace upg {

// All functions take some rows, which threads may share, and return the first of them that does not allow it, or their end.
// Planes may hold anything; row pointers must have passed the structural check.

// The first row whose mask has a bit outside the matrix, or more bits than the row has entries.
size_t first_bad_mask_row(const Layer&, Range rows);

// Writes the mask of a layer with deltas; two entries on one column, other than end padding, do not allow it.
size_t mask_from_deltas(const Layer&, Range rows, std::uint8_t* mask);
// The reverse, into `deltas` of zeros; a gap of over 255 columns does not allow it.
size_t deltas_from_mask(const Layer&, Range rows, std::uint8_t* deltas);

// Writes rows of `stride` entries, one a column, into zeros. Only what an encoder makes allows it: fillers where gaps
// need them, no more padding than `alignment` needs, and prime indices of 0 for both.
size_t dense_from_deltas(const Layer&, Range rows, size_t stride, size_t alignment, std::int8_t* values,
                         std::uint16_t* primes);
// The reverse: how many entries each row will have, and then those entries, into zeros.
void row_lengths_of_dense(const Layer&, Range rows, size_t stride, size_t alignment, std::uint32_t* lengths);
void deltas_from_dense(const Layer&, Range rows, size_t stride, const std::uint32_t* row_pointers,
                       std::int8_t* values, std::uint8_t* deltas, std::uint16_t* primes);

}  // namespace upg
