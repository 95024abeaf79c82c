// What only the full check of a layer asks (docs/format.md, section 1), at the speed of memory.
#pragma once

#include "layer.h"

namespace upg {

// The first of some rows of a layer with deltas that breaks rule 5, 6 or 7, or their end. Planes may hold anything.
size_t first_bad_row(const Layer&, Range rows);

}  // namespace upg
