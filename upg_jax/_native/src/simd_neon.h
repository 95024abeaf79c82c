// The vector operations with 64-bit ARM's Advanced SIMD; see simd_portable.h for what each one does.
#pragma once

#include <arm_neon.h>

#include "expansion.h"
#include "primes.h"
#include "slabs.h"

namespace upg {
namespace {

struct Neon {
  static constexpr const char* kName = "neon";

  struct Eight {
    float32x4_t low, high;
  };
  static Eight zero() { return broadcast(0); }
  static Eight load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Eight load_once(const float* p) { return load(p); }
  static void store(float* p, Eight v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static Eight multiply(Eight a, Eight b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static Eight multiply_add(Eight a, Eight b, Eight c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static Eight add(Eight a, Eight b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static Eight broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static float sum(Eight v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
  UPG_INLINE static Eight from_int8(const std::int8_t* q) {
    const int16x8_t wide = vmovl_s8(vld1_s8(q));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
  }
  UPG_INLINE static Eight primes(const std::uint16_t* k) {
    const std::uint16_t* table = kPrimeLowHalves;
    uint16x8_t low = vld1q_dup_u16(table + k[0]);
    low = vld1q_lane_u16(table + k[1], low, 1);
    low = vld1q_lane_u16(table + k[2], low, 2);
    low = vld1q_lane_u16(table + k[3], low, 3);
    low = vld1q_lane_u16(table + k[4], low, 4);
    low = vld1q_lane_u16(table + k[5], low, 5);
    low = vld1q_lane_u16(table + k[6], low, 6);
    low = vld1q_lane_u16(table + k[7], low, 7);
    const uint16x8_t high = vshrq_n_u16(vcgeq_u16(vld1q_u16(k), vdupq_n_u16(kFirstPrimeAbove16Bits)), 15);
    const uint32x4_t first = vreinterpretq_u32_u16(vzip1q_u16(low, high));
    const uint32x4_t second = vreinterpretq_u32_u16(vzip2q_u16(low, high));
    return {vcvtq_f32_u32(first), vcvtq_f32_u32(second)};
  }
  static std::uint32_t running_columns(const std::uint8_t* deltas, std::uint32_t column, std::uint32_t* columns) {
    const uint16x8_t zero = vdupq_n_u16(0);
    uint16x8_t sums = vmovl_u8(vld1_u8(deltas));
    sums = vaddq_u16(sums, vextq_u16(zero, sums, 7));
    sums = vaddq_u16(sums, vextq_u16(zero, sums, 6));
    sums = vaddq_u16(sums, vextq_u16(zero, sums, 4));
    const uint32x4_t start = vdupq_n_u32(column);
    vst1q_u32(columns, vaddw_u16(start, vget_low_u16(sums)));
    vst1q_u32(columns + 4, vaddw_high_u16(start, sums));
    return column + vgetq_lane_u16(sums, 7);
  }
  UPG_INLINE static Eight gather(const float* x, const size_t* c) { return {gather_four(x, c), gather_four(x, c + 4)}; }
  UPG_INLINE static Eight from_half(const std::uint16_t* h) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(h));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
  UPG_INLINE static void expand(std::uint64_t bits, const std::int8_t* values, std::int8_t* out) {
    for (size_t i = 0; i < 64; i += 8) {
      const int8x16_t eight = vcombine_s8(vld1_s8(values), vdup_n_s8(0));
      vst1_s8(out + i, vqtbl1_s8(eight, vld1_u8(kExpansion[bits >> i & 255])));
      values += __builtin_popcountll(bits >> i & 255);
    }
  }
  static size_t sum_bytes(const std::uint8_t* p, size_t count) {
    uint64x2_t sums = vdupq_n_u64(0);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      sums = vpadalq_u32(sums, vpaddlq_u16(vpaddlq_u8(vld1q_u8(p + i))));
    }
    size_t total = vaddvq_u64(sums);
    for (; i < count; ++i) total += p[i];
    return total;
  }

  using Run = Neon;
  static constexpr size_t kRun = 8;
  static constexpr size_t kSums = 8;

  using Wide = float32x4_t;
  static constexpr size_t kLanes = 4;
  static constexpr size_t kUnits = 4;
  static constexpr size_t kBlockRows = 4;
  static constexpr size_t kBlockUnits = 1;
  static Wide wide_zero() { return vdupq_n_f32(0); }
  static Wide wide_load(const float* p) { return vld1q_f32(p); }
  static void wide_store(float* p, Wide v) { vst1q_f32(p, v); }
  static Wide wide_broadcast(float x) { return vdupq_n_f32(x); }
  static Wide wide_add(Wide a, Wide b) { return vaddq_f32(a, b); }
  static Wide wide_multiply(Wide a, Wide b) { return vmulq_f32(a, b); }
  static Wide wide_multiply_add(Wide a, Wide b, Wide c) { return vfmaq_f32(c, a, b); }

 private:
  UPG_INLINE static float32x4_t gather_four(const float* x, const size_t* c) {
    float32x4_t v = vld1q_dup_f32(x + c[0]);
    v = vld1q_lane_f32(x + c[1], v, 1);
    v = vld1q_lane_f32(x + c[2], v, 2);
    return vld1q_lane_f32(x + c[3], v, 3);
  }
};

}  // namespace
}  // namespace upg
