#include "primes.h"

#include <array>
#include <cstddef>

namespace upg {
namespace {

using std::size_t;

constexpr size_t kPrimes = 10000;
constexpr size_t kLargestPrime = 104729;

std::array<std::uint16_t, 65536> low_halves() {
  std::array<bool, kLargestPrime + 1> composite{};
  std::array<std::uint16_t, 65536> table{};
  size_t k = 0;
  for (size_t n = 2; n <= kLargestPrime; ++n) {
    if (composite[n]) continue;
    table[k++] = static_cast<std::uint16_t>(n & 0xffff);
    for (size_t multiple = n * n; multiple <= kLargestPrime; multiple += n) composite[multiple] = true;
  }
  for (; k < table.size(); ++k) table[k] = table[kPrimes - 1];
  return table;
}

const std::array<std::uint16_t, 65536> table = low_halves();

}  // namespace

const std::uint16_t* const kPrimeLowHalves = table.data();

}  // namespace upg
