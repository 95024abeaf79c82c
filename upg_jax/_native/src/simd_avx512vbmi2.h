// AVX-512 with VBMI2, which expands bytes in one instruction.
#pragma once

#include "simd_avx512.h"

namespace upg {
namespace {

struct Avx512Vbmi2 : Avx512 {
  static constexpr const char* kName = "avx512vbmi2";

  static void expand(std::uint64_t bits, const std::int8_t* values, std::int8_t* out) {
    // Not from memory: that form is slow on Zen 4.
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values)));
  }
};

}  // namespace
}  // namespace upg
