// Metal's simdgroup operations and barriers. Each notes where it was called.
#pragma once
#include "engine.h"
#include "types.h"

namespace msl {

template <class T> inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T> inline T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Combined pairwise, as hardware does.
template <class T, class Combine> inline T reduce(T value, Place place, Combine combine) {
  return from_bits<T>(collective(to_bits(value), place, [&](const uint64_t* values, uint64_t* results, uint n) {
    T parts[kWidth];
    for (uint i = 0; i < n; ++i) parts[i] = from_bits<T>(values[i]);
    for (uint step = 1; step < n; step *= 2) {
      for (uint i = 0; i + step < n; i += 2 * step) parts[i] = combine(parts[i], parts[i + step]);
    }
    for (uint i = 0; i < n; ++i) results[i] = to_bits(parts[0]);
  }));
}

template <class T> inline T scan(T value, Place place, bool inclusive) {
  return from_bits<T>(collective(to_bits(value), place, [&](const uint64_t* values, uint64_t* results, uint n) {
    T sum = T(0);
    for (uint i = 0; i < n; ++i) {
      const T next = T(sum + from_bits<T>(values[i]));
      results[i] = to_bits(inclusive ? next : sum);
      sum = next;
    }
  }));
}

// Every lane may ask for another lane's value.
template <class T> inline T value_of_lane(T value, uint lane, Place place) {
  Engine& e = engine();
  Simdgroup& s = e.simdgroups[e.running->lane / kWidth];
  const uint set = s.serial & 1;
  collective(to_bits(value), place, [](const uint64_t*, uint64_t*, uint) {});
  if (lane >= kWidth || !(s.all >> lane & 1)) fail(place.text() + " reads lane " + std::to_string(lane) + ", which does not exist");
  return from_bits<T>(s.values[set][lane]);
}

inline uint own_lane() { return engine().running->lane % kWidth; }

}  // namespace msl

#define MSL_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define MSL_PLACE msl::Place{__func__, file, line}

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags, MSL_CALLER) { msl::barrier(MSL_PLACE); }
inline void simdgroup_barrier(mem_flags, MSL_CALLER) {
  msl::collective(0, MSL_PLACE, [](const uint64_t*, uint64_t*, uint) {});
}
template <class T> T simd_sum(T v, MSL_CALLER) {
  return msl::reduce(v, MSL_PLACE, [](T a, T b) { return T(a + b); });
}
template <class T> T simd_max(T v, MSL_CALLER) {
  return msl::reduce(v, MSL_PLACE, [](T a, T b) { return a > b ? a : b; });
}
template <class T> T simd_min(T v, MSL_CALLER) {
  return msl::reduce(v, MSL_PLACE, [](T a, T b) { return a < b ? a : b; });
}
inline bool simd_any(bool v, MSL_CALLER) {
  return msl::reduce(v, MSL_PLACE, [](bool a, bool b) { return a || b; });
}
inline bool simd_all(bool v, MSL_CALLER) {
  return msl::reduce(v, MSL_PLACE, [](bool a, bool b) { return a && b; });
}
template <class T> T simd_prefix_inclusive_sum(T v, MSL_CALLER) { return msl::scan(v, MSL_PLACE, true); }
template <class T> T simd_prefix_exclusive_sum(T v, MSL_CALLER) { return msl::scan(v, MSL_PLACE, false); }
template <class T> T simd_broadcast(T v, ushort lane, MSL_CALLER) { return msl::value_of_lane(v, lane, MSL_PLACE); }
template <class T> T simd_shuffle(T v, ushort lane, MSL_CALLER) { return msl::value_of_lane(v, lane, MSL_PLACE); }
// The first lanes, which have nobody so far below them, keep their own value.
template <class T> T simd_shuffle_up(T v, ushort delta, MSL_CALLER) {
  const msl::uint lane = msl::own_lane();
  return msl::value_of_lane(v, lane < delta ? lane : lane - delta, MSL_PLACE);
}
template <class T> T simd_shuffle_xor(T v, ushort mask, MSL_CALLER) {
  return msl::value_of_lane(v, msl::own_lane() ^ mask, MSL_PLACE);
}

}  // namespace metal
