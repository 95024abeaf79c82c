// AVX-512 with VBMI2, which expands bytes in one instruction.
#pragma once

#include "simd_avx512.h"

namespace upg {
namespace {

struct Avx512Vbmi2 : Avx512 {
  static constexpr const char* kName = "avx512vbmi2";

  UPG_INLINE static void expand(std::uint64_t bits, const std::int8_t* values, std::int8_t* out) {
    // Into zeros, and not the form that makes them: that one waits for the register's last value on Zen 4.
    __m512i zeros = _mm512_setzero_si512();
    asm("" : "+v"(zeros));
    _mm512_storeu_si512(out, _mm512_mask_expand_epi8(zeros, bits, _mm512_loadu_si512(values)));
  }
};

}  // namespace
}  // namespace upg
