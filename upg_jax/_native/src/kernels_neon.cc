#include "kernels_of.h"
#include "simd_neon.h"

namespace upg {

const Kernels kNeonKernels = kernels_of<Neon>();

}  // namespace upg
