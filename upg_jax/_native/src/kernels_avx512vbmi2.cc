#include "kernels_of.h"
#include "simd_avx512vbmi2.h"
#include "window_product.h"

namespace upg {

const Kernels kAvx512Vbmi2Kernels = with_windows<Avx512Vbmi2>();

}  // namespace upg
