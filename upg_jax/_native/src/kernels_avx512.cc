#include "kernels_of.h"
#include "simd_avx512.h"
#include "window_product.h"

namespace upg {
namespace {

constexpr Kernels with_windows(Kernels kernels) {
  kernels.product_with_vector = product_with_vector_by_density;
  return kernels;
}

}  // namespace

const Kernels kAvx512Kernels = with_windows(kernels_of<Avx512>());

}  // namespace upg
