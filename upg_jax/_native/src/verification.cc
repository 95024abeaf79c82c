#include "verification.h"

namespace upg {
namespace {

constexpr std::uint16_t kPrimes = 10000;

// The rules speak of whole rows; yet an entry and the one before it tell all: a row of good pairs is good. Loops without
// branches, which compilers turn into vector code.
bool is_bad(const std::int8_t* q, const std::uint8_t* d, size_t n) {
  if (n == 0) return false;
  // An entry of value 0 bridges 255 columns, or is padding. The last one bridges nothing.
  auto bad = static_cast<std::uint8_t>((q[0] == 0) & (d[0] != 0) & (d[0] != 255));
  bad = static_cast<std::uint8_t>(bad | ((q[n - 1] == 0) & (d[n - 1] == 255)));
  for (size_t i = 1; i < n; ++i) {
    const auto filler = static_cast<std::uint8_t>(q[i] == 0), was_filler = static_cast<std::uint8_t>(q[i - 1] == 0);
    const auto still = static_cast<std::uint8_t>(d[i] == 0), was_still = static_cast<std::uint8_t>(d[i - 1] == 0);
    const auto padding = static_cast<std::uint8_t>(filler & still);
    // A weight moves on, and so does what follows a bridge; padding is followed by padding.
    bad = static_cast<std::uint8_t>(bad | (still & (filler ^ 1)) | (still & was_filler & (was_still ^ 1)) |
                                    (was_filler & was_still & (padding ^ 1)) |
                                    (filler & (still ^ 1) & static_cast<std::uint8_t>(d[i] != 255)));
  }
  return bad != 0;
}

bool is_bad(const std::int8_t* q, const std::uint16_t* k, size_t n) {
  std::uint16_t bad = 0;
  for (size_t i = 0; i < n; ++i) {
    bad = static_cast<std::uint16_t>(bad | (k[i] >= kPrimes) | ((q[i] == 0) & (k[i] != 0)));
  }
  return bad != 0;
}

}  // namespace

size_t first_bad_row(const Layer& layer, Range rows) {
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const Range e = entries_of(layer, row);
    const size_t n = e.end - e.begin;
    if (is_bad(layer.values + e.begin, layer.deltas + e.begin, n)) return row;
    if (layer.primes && is_bad(layer.values + e.begin, layer.primes + e.begin, n)) return row;
  }
  return rows.end;
}

}  // namespace upg
