#include "ffi_operands.h"

namespace upg {

size_t product_of(ffi::AnyBuffer::Dimensions dims, size_t begin, size_t end) {
  size_t product = 1;
  for (size_t i = begin; i < end; ++i) product *= static_cast<size_t>(dims[i]);
  return product;
}

bool has_shape(const ffi::AnyBuffer& buffer, ffi::DataType type, std::initializer_list<size_t> shape) {
  const auto dims = buffer.dimensions();
  if (buffer.element_type() != type || dims.size() != shape.size()) return false;
  size_t i = 0;
  for (const size_t n : shape) {
    if (static_cast<size_t>(dims[i++]) != n) return false;
  }
  return true;
}

bool element_of(ffi::DataType type, Element& element) {
  switch (type) {
    case ffi::F32:
      element = Element::kFloat32;
      return true;
    case ffi::BF16:
      element = Element::kBFloat16;
      return true;
    case ffi::F16:
      element = Element::kFloat16;
      return true;
    default:
      return false;
  }
}

std::string read_stack(const ffi::AnyBuffer& scales, const ffi::AnyBuffer& row_pointers, const ffi::AnyBuffer& values,
                       const ffi::AnyBuffer& deltas, ffi::RemainingArgs rest, size_t columns, Encoding encoding, Stack& stack) {
  const auto [index, bits, group_size] = encoding;
  const bool narrow = bits != 8;
  if (narrow && ((bits != 4 && bits != 3) || group_size <= 0 || group_size % 32 != 0 || 1024 % group_size != 0 || index == 0)) {
    return "values of 4 or 3 bits need groups of 32, 64 or 128 and a mask or dense rows";
  }
  if (scales.dimensions().size() != 2 || values.dimensions().size() != 2) return "planes must have a stack axis";
  const size_t layers = static_cast<size_t>(scales.dimensions()[0]);
  const size_t rows = static_cast<size_t>(scales.dimensions()[1]);
  const size_t bytes = static_cast<size_t>(values.dimensions()[1]);
  const size_t capacity = bytes * 8 / static_cast<size_t>(bits);
  if (!has_shape(scales, ffi::F32, {layers, rows})) return "scales must be float32 (layers, rows)";
  if (!has_shape(row_pointers, ffi::U32, {layers, rows + 1})) return "row_pointers must be uint32 (layers, rows + 1)";
  if (!has_shape(values, ffi::S8, {layers, bytes})) return "values must be int8 (layers, capacity)";
  const std::uint16_t* primes = nullptr;
  if (rest.size() > 1) return "too many operands";
  if (narrow) {
    const size_t groups = (columns + static_cast<size_t>(group_size) - 1) / static_cast<size_t>(group_size);
    if (rest.size() != 1) return "multipliers are missing";
    const auto plane = rest.get<ffi::AnyBuffer>(0);
    if (!plane.has_value() || !has_shape(*plane, ffi::U8, {layers, rows * groups})) {
      return "group_scales must be uint8 (layers, rows * groups)";
    }
    stack.first.multipliers = plane->typed_data<std::uint8_t>();
  } else if (rest.size() == 1) {
    const auto plane = rest.get<ffi::AnyBuffer>(0);
    if (!plane.has_value() || !has_shape(*plane, ffi::U16, {layers, capacity})) {
      return "prime_indices must be uint16 (layers, capacity)";
    }
    primes = plane->typed_data<std::uint16_t>();
  }
  if (columns >= size_t{1} << 31 || capacity >= size_t{1} << 31) return "shapes must stay below 2**31";
  if (index < 0 || index > 2) return "the index must be delta8, mask or dense";
  const std::uint8_t* const multipliers = stack.first.multipliers;
  stack.first = {values.typed_data<std::int8_t>(),
                 deltas.typed_data<std::uint8_t>(),
                 primes,
                 scales.typed_data<float>(),
                 row_pointers.typed_data<std::uint32_t>(),
                 rows,
                 columns,
                 capacity,
                 static_cast<Index>(index),
                 static_cast<size_t>(bits),
                 static_cast<size_t>(group_size),
                 multipliers};
  if (!has_shape(deltas, ffi::U8, {layers, index_bytes(stack.first)})) {
    return "delta_indices must be uint8 (layers, as the index says)";
  }
  stack.layers = layers;
  return {};
}

}  // namespace upg
