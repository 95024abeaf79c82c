// The prime table, in the form that the kernels read.
#pragma once

#include <cstdint>

namespace upg {

// For every k of 16 bits the low half of its prime, k clamped to the table's last; primes from index
// kFirstPrimeAbove16Bits on exceed 16 bits, and none exceeds 17. Half the size of the primes themselves, it leaves room
// for the vector in the first-level cache.
extern const std::uint16_t* const kPrimeLowHalves;
constexpr std::uint16_t kFirstPrimeAbove16Bits = 6542;

}  // namespace upg
