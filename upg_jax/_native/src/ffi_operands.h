// Reading the operands of XLA's calls.
#pragma once

#include <initializer_list>
#include <string>

#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace upg {

namespace ffi = xla::ffi;

inline ffi::Error failed(const std::string& message) { return ffi::Error::InvalidArgument("upg_jax: " + message); }

size_t product_of(ffi::AnyBuffer::Dimensions, size_t begin, size_t end);
bool has_shape(const ffi::AnyBuffer&, ffi::DataType, std::initializer_list<size_t> shape);
// False for other types than float32, bfloat16 and float16.
bool element_of(ffi::DataType, Element&);

// How a layer is encoded; attributes of a call.
struct Encoding {
  std::int32_t index;
  std::int32_t value_bits = 8;
  std::int32_t group_size = 0;
};

// Reads the planes of a stack; returns what is wrong with them, or nothing.
std::string read_stack(const ffi::AnyBuffer& scales, const ffi::AnyBuffer& row_pointers, const ffi::AnyBuffer& values,
                       const ffi::AnyBuffer& deltas, ffi::RemainingArgs rest, size_t columns, Encoding, Stack&);

}  // namespace upg
