#include "kernels_of.h"
#include "simd_avx2.h"

namespace upg {

const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace upg
