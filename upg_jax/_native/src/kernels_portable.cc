#include "kernels_of.h"
#include "simd_portable.h"

namespace upg {

const Kernels kPortableKernels = kernels_of<Portable>();

}  // namespace upg
