#include "ffi_handlers.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "execution.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace upg {
namespace {

namespace ffi = xla::ffi;

ffi::Error failed(const std::string& message) { return ffi::Error::InvalidArgument("upg_jax: " + message); }

// The calling thread works too, and stays the one that goes on with the program: the pool's threads then stay ready for
// the next operation.
ffi::Error execute(std::unique_ptr<Plan> plan, ffi::ThreadPool& pool) {
  const size_t helpers = helpers_for(*plan, static_cast<size_t>(pool.num_threads()));
  if (helpers == 0) {
    Execution(std::move(plan), 1).work();
    return ffi::Error::Success();
  }
  const auto execution = std::make_shared<Execution>(std::move(plan), helpers + 1);
  for (size_t i = 0; i < helpers; ++i) pool.Schedule([execution] { execution->work(); });
  execution->work();
  return ffi::Error::Success();
}

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

// How a layer is encoded; attributes of a call.
struct Encoding {
  std::int32_t index;
  std::int32_t value_bits = 8;
  std::int32_t group_size = 0;
};

// Reads the planes of a stack; returns what is wrong with them, or nothing.
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

using MakePlan = std::unique_ptr<Plan> (*)(const Stack&, const Vectors&, float* y, float* scratch);
using ScratchFloats = size_t (*)(const Stack&, size_t vectors);

// Both products: x (*group, *batch, features), index (*group), y (*group, *batch, features of the other side).
ffi::Error multiply(ffi::ThreadPool& pool, bool transposed, Encoding encoding, ffi::AnyBuffer x, ffi::AnyBuffer scales,
                     ffi::AnyBuffer index, ffi::AnyBuffer row_pointers, ffi::AnyBuffer values, ffi::AnyBuffer deltas,
                     ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto x_dims = x.dimensions();
  const auto y_dims = y->dimensions();
  const size_t rank = x_dims.size();
  const size_t group_rank = index.dimensions().size();
  if (rank <= group_rank || y_dims.size() != rank) return failed("x and y must be (*group, *batch, features)");
  const size_t x_features = static_cast<size_t>(x_dims[rank - 1]);
  const size_t y_features = static_cast<size_t>(y_dims[rank - 1]);
  Stack stack{};
  const std::string problem = read_stack(scales, row_pointers, values, deltas, rest,
                                         transposed ? y_features : x_features, encoding, stack);
  if (!problem.empty()) return failed(problem);
  if (stack.first.rows != (transposed ? x_features : y_features)) return failed("features must be those of the layer");
  Vectors vectors{x.untyped_data(), Element::kFloat32, product_of(x_dims, group_rank, rank - 1)};
  if (!element_of(x.element_type(), vectors.element)) return failed("x must be float32, bfloat16 or float16");
  if (encoding.value_bits != 8 && (transposed || vectors.count > kVectorsOfWholeRows)) {
    return failed("values of fewer than 8 bits multiply at most eight vectors");
  }
  stack.groups = product_of(index.dimensions(), 0, group_rank);
  if (index.element_type() != ffi::S32 || product_of(x_dims, 0, group_rank) != stack.groups) {
    return failed("index must be int32 of x's leading shape");
  }
  stack.index = index.typed_data<std::int32_t>();
  if (y->element_type() != ffi::F32 || y->element_count() != stack.groups * vectors.count * y_features) {
    return failed("y must be float32 of x's leading shape");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  float* const out = y->typed_data<float>();
  if (stack.layers == 0) {
    std::memset(out, 0, y->size_bytes());
    return ffi::Error::Success();
  }
  const size_t needed = transposed ? transposed_scratch(stack, vectors.count) : product_scratch(stack, vectors.count);
  if (scratch->element_type() != ffi::F32 || scratch->element_count() < needed) return failed("scratch is too small");
  float* const work = scratch->typed_data<float>();
  return execute(transposed ? transposed_plan(stack, vectors, out, work) : product_plan(stack, vectors, out, work), pool);
}

ffi::Error sparse_dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scales, ffi::AnyBuffer index,
                         ffi::AnyBuffer row_pointers, ffi::AnyBuffer values, ffi::AnyBuffer deltas,
                         ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch,
                         std::int32_t encoding) {
  return multiply(pool, false, {encoding}, x, scales, index, row_pointers, values, deltas, rest, y, scratch);
}

ffi::Error dense_sparse(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer scales, ffi::AnyBuffer index,
                         ffi::AnyBuffer row_pointers, ffi::AnyBuffer values, ffi::AnyBuffer deltas,
                         ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch,
                         std::int32_t encoding) {
  return multiply(pool, true, {encoding}, g, scales, index, row_pointers, values, deltas, rest, y, scratch);
}

ffi::Error sparse_dense_narrow(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scales, ffi::AnyBuffer index,
                               ffi::AnyBuffer row_pointers, ffi::AnyBuffer values, ffi::AnyBuffer deltas,
                               ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                               ffi::Result<ffi::AnyBuffer> scratch, std::int32_t encoding, std::int32_t bits,
                               std::int32_t group_size) {
  return multiply(pool, false, {encoding, bits, group_size}, x, scales, index, row_pointers, values, deltas, rest, y, scratch);
}

ffi::Error decode_any(ffi::ThreadPool& pool, Encoding encoding, ffi::AnyBuffer scales, ffi::AnyBuffer row_pointers,
                      ffi::AnyBuffer values, ffi::AnyBuffer deltas, ffi::RemainingArgs rest,
                      ffi::Result<ffi::AnyBuffer> out) {
  const auto dims = out->dimensions();
  if (dims.size() != 3) return failed("the dense result must be (layers, rows, columns)");
  Stack stack{};
  const std::string problem =
      read_stack(scales, row_pointers, values, deltas, rest, static_cast<size_t>(dims[2]), encoding, stack);
  if (!problem.empty()) return failed(problem);
  const bool rounded = out->element_type() == ffi::BF16;
  if (!has_shape(*out, rounded ? ffi::BF16 : ffi::F32, {stack.layers, stack.first.rows, stack.first.columns})) {
    return failed("the dense result must be float32 or bfloat16 (layers, rows, columns)");
  }
  if (out->element_count() == 0) return ffi::Error::Success();
  return execute(decode_plan(stack, out->untyped_data(), rounded ? Element::kBFloat16 : Element::kFloat32), pool);
}

ffi::Error decode(ffi::ThreadPool pool, ffi::AnyBuffer scales, ffi::AnyBuffer row_pointers, ffi::AnyBuffer values,
                  ffi::AnyBuffer deltas, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, std::int32_t encoding) {
  return decode_any(pool, {encoding}, scales, row_pointers, values, deltas, rest, out);
}

ffi::Error decode_narrow(ffi::ThreadPool pool, ffi::AnyBuffer scales, ffi::AnyBuffer row_pointers, ffi::AnyBuffer values,
                         ffi::AnyBuffer deltas, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                         std::int32_t encoding, std::int32_t bits, std::int32_t group_size) {
  return decode_any(pool, {encoding, bits, group_size}, scales, row_pointers, values, deltas, rest, out);
}

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::AnyBuffer layer, ffi::AnyBuffer positions, ffi::AnyBuffer filled,
                  ffi::Result<ffi::AnyBuffer> out, float scale, float cap, std::int32_t window) {
  const auto q = queries.dimensions(), k = keys.dimensions();
  if (q.size() != 3 || k.size() != 5) return failed("q must be (batch, heads, dim), keys (layers, batch, kv_heads, length, dim)");
  const auto size = [](std::int64_t n) { return static_cast<size_t>(n); };
  Attention a{};
  a.batch = size(q[0]), a.heads = size(q[1]), a.dim = size(q[2]);
  const size_t layers = size(k[0]);
  a.kv_heads = size(k[2]), a.length = size(k[3]);
  if (!element_of(queries.element_type(), a.element)) return failed("q must be float32, bfloat16 or float16");
  for (const ffi::AnyBuffer& buffer : {keys, values}) {
    if (!has_shape(buffer, queries.element_type(), {layers, a.batch, a.kv_heads, a.length, a.dim})) {
      return failed("keys and values must be (layers, batch, kv_heads, length, dim) of q's dtype");
    }
  }
  if (!has_shape(*out, ffi::F32, {a.batch, a.heads, a.dim})) return failed("the result must be float32 of q's shape");
  if (out->element_count() == 0) return ffi::Error::Success();
  if (layers == 0 || a.kv_heads == 0 || a.heads % a.kv_heads != 0) return failed("heads must be a multiple of kv_heads");
  if (a.dim > Attention::kMostDim) return failed("dim must be at most " + std::to_string(Attention::kMostDim));
  if (!has_shape(layer, ffi::S32, {})) return failed("layer must be an int32");
  if (!has_shape(positions, ffi::S32, {a.batch}) || !has_shape(filled, ffi::S32, {a.batch})) {
    return failed("positions and filled must be int32 (batch)");
  }
  const auto last = static_cast<std::int64_t>(layers) - 1;
  a.layer = size(std::clamp<std::int64_t>(*layer.typed_data<std::int32_t>(), 0, last));
  a.queries = queries.untyped_data(), a.keys = keys.untyped_data(), a.values = values.untyped_data();
  a.positions = positions.typed_data<std::int32_t>(), a.filled = filled.typed_data<std::int32_t>();
  a.scale = scale, a.cap = cap, a.window = window;
  return execute(attention_plan(a, out->typed_data<float>()), pool);
}

// x, scales, index, row_pointers, values, deltas and further planes; y and scratch.
auto product_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<std::int32_t>("index");
}

// scales, row_pointers, values, deltas and further planes; the dense matrices.
auto decode_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Attr<std::int32_t>("index");
}

}  // namespace
}  // namespace upg

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_sparse_dense, upg::sparse_dense, upg::product_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_dense_sparse, upg::dense_sparse, upg::product_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_decode, upg::decode, upg::decode_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_sparse_dense_narrow, upg::sparse_dense_narrow,
                              upg::product_binding().Attr<std::int32_t>("bits").Attr<std::int32_t>("group_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_decode_narrow, upg::decode_narrow,
                              upg::decode_binding().Attr<std::int32_t>("bits").Attr<std::int32_t>("group_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_attend, upg::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<std::int32_t>("window"));
