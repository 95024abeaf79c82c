// Vectors to the layout of slabs.h and back.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace upg {

// Packs features [range) of one group's vectors.
void pack(const Vectors& x, size_t group, size_t features, Range range, float* packed);
// The same by words, for rows that are read whole.
void pack_by_words(const Vectors& x, size_t group, size_t features, Range range, float* packed);

// Sums `parts` packed results, `stride` floats apart, into features [range) of y (count, features).
void unpack_sum(const float* packed, size_t parts, size_t stride, size_t count, size_t features, Range range, float* y);
void unpack_sum_of_words(const float* packed, size_t parts, size_t stride, size_t count, size_t features, Range range,
                         float* y);

}  // namespace upg
