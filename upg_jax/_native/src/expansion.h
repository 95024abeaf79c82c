// Where each byte of an expanded run of eight comes from, by the run's bits.
#pragma once

#include <cstdint>

namespace upg {

// 0x80 where there is no bit, which shuffle instructions read as 0.
extern const std::uint8_t (*const kExpansion)[8];

}  // namespace upg
