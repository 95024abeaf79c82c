#include "gathered_product.h"
#include "kernels_of.h"
#include "simd_avx2.h"

namespace upg {

const Kernels kAvx2Kernels = kernels_of<Avx2>();

float gathered_product_with_avx2(const Layer& layer, size_t begin, size_t end, size_t column, const float* x) {
  return layer.primes ? gathered_product<Avx2, true>(layer, begin, end, column, x)
                      : gathered_product<Avx2, false>(layer, begin, end, column, x);
}

}  // namespace upg
