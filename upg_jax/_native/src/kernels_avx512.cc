#include "kernels_of.h"
#include "simd_avx512.h"
#include "window_product.h"

namespace upg {

const Kernels kAvx512Kernels = with_windows<Avx512>();

}  // namespace upg
