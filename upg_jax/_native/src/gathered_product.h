// The AVX2 product of a row with one vector, for the AVX-512 kernels. It is faster compiled for AVX2 alone: given more
// registers, compilers spread it over them.
#pragma once

#include "layer.h"

namespace upg {

// The unscaled product of entries [begin, end) of a row, the first of which counts from `column`.
float gathered_product_with_avx2(const Layer&, size_t begin, size_t end, size_t column, const float* x);

}  // namespace upg
