#include "expansion.h"

namespace upg {
namespace {

struct Table {
  alignas(64) std::uint8_t places[256][8];

  constexpr Table() : places() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      std::uint8_t next = 0;
      for (unsigned i = 0; i < 8; ++i) {
        const bool present = (bits >> i & 1) != 0;
        places[bits][i] = present ? next : std::uint8_t{0x80};
        if (present) ++next;
      }
    }
  }
};

constexpr Table table;

}  // namespace

const std::uint8_t (*const kExpansion)[8] = table.places;

}  // namespace upg
