// The vector operations of the kernels in portable C++, and the list of what an instruction set must provide.
//
// `Eight` is eight floats: the kernels that follow the deltas take entries eight at a time. `Wide` is the widest
// register: the kernels that meet a slab of vectors hold `kUnits * kUnit` floats in registers, and those of matrices
// `kBlockUnits * kUnit` floats of each of `kBlockRows` rows.
#pragma once

#include "half.h"
#include "primes.h"
#include "slabs.h"

namespace upg {
namespace {

struct Portable {
  static constexpr const char* kName = "portable";

  struct Eight {
    float lane[8];
  };

  static Eight zero() { return {}; }
  static Eight load(const float* p) {
    Eight v;
    for (int i = 0; i < 8; ++i) v.lane[i] = p[i];
    return v;
  }
  static Eight load_once(const float* p) { return load(p); }
  static void store(float* p, Eight v) {
    for (int i = 0; i < 8; ++i) p[i] = v.lane[i];
  }
  static Eight multiply(Eight a, Eight b) {
    for (int i = 0; i < 8; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  // a * b + c
  static Eight multiply_add(Eight a, Eight b, Eight c) {
    for (int i = 0; i < 8; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static Eight add(Eight a, Eight b) {
    for (int i = 0; i < 8; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Eight broadcast(float x) {
    Eight v;
    for (int i = 0; i < 8; ++i) v.lane[i] = x;
    return v;
  }
  static float sum(Eight v) {
    return ((v.lane[0] + v.lane[4]) + (v.lane[1] + v.lane[5])) + ((v.lane[2] + v.lane[6]) + (v.lane[3] + v.lane[7]));
  }
  // Eight stored values as floats.
  UPG_INLINE static Eight from_int8(const std::int8_t* q) {
    Eight v;
    for (int i = 0; i < 8; ++i) v.lane[i] = static_cast<float>(q[i]);
    return v;
  }
  // The primes of eight indices as floats; any index is safe.
  UPG_INLINE static Eight primes(const std::uint16_t* k) {
    Eight v;
    for (int i = 0; i < 8; ++i) {
      const std::int32_t high = k[i] >= kFirstPrimeAbove16Bits ? 65536 : 0;
      v.lane[i] = static_cast<float>(high + kPrimeLowHalves[k[i]]);
    }
    return v;
  }
  // The columns of eight entries, the first of which counts from `column`; returns the last.
  static std::uint32_t running_columns(const std::uint8_t* deltas, std::uint32_t column, std::uint32_t* columns) {
    for (int i = 0; i < 8; ++i) columns[i] = column += deltas[i];
    return column;
  }
  UPG_INLINE static Eight gather(const float* x, const size_t* c) {
    Eight v;
    for (int i = 0; i < 8; ++i) v.lane[i] = x[c[i]];
    return v;
  }
  UPG_INLINE static Eight from_half(const std::uint16_t* h) {
    Eight v;
    for (int i = 0; i < 8; ++i) v.lane[i] = float_from_half(h[i]);
    return v;
  }
  // Puts consecutive values where `bits` says: 64 bytes, 0 where there is no bit. Reads 64 values.
  UPG_INLINE static void expand(std::uint64_t bits, const std::int8_t* values, std::int8_t* out) {
    for (int i = 0; i < 64; ++i) {
      // Without a branch, which no processor could predict.
      const std::uint64_t bit = bits >> i & 1;
      out[i] = static_cast<std::int8_t>(*values * static_cast<int>(bit));
      values += bit;
    }
  }
  // The sum of `count` bytes.
  static size_t sum_bytes(const std::uint8_t* p, size_t count) {
    size_t total = 0;
    for (size_t i = 0; i < count; ++i) total += p[i];
    return total;
  }

  // Eight or more floats, with the operations of `Eight`: the kernels that read whole rows take so many at a time.
  using Run = Portable;
  static constexpr size_t kRun = 8;
  static constexpr size_t kSums = 1;

  // GCC's and Clang's vectors: their loops over arrays as long as a register do not all become vector code.
  using Wide = float __attribute__((vector_size(16)));
  static constexpr size_t kLanes = 4;
  static constexpr size_t kUnits = 2;
  static constexpr size_t kBlockRows = 2;
  static constexpr size_t kBlockUnits = 1;
  static Wide wide_zero() { return Wide{}; }
  static Wide wide_load(const float* p) {
    Wide v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void wide_store(float* p, Wide v) { __builtin_memcpy(p, &v, sizeof v); }
  static Wide wide_broadcast(float x) { return Wide{x, x, x, x}; }
  static Wide wide_add(Wide a, Wide b) { return a + b; }
  static Wide wide_multiply(Wide a, Wide b) { return a * b; }
  static Wide wide_multiply_add(Wide a, Wide b, Wide c) { return a * b + c; }
};

}  // namespace
}  // namespace upg
