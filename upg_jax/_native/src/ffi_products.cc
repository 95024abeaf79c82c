// Products and decoding: shapes, types and attributes of XLA's calls.
#include <cstring>

#include "ffi_call.h"
#include "ffi_handlers.h"
#include "ffi_operands.h"

namespace upg {
namespace {

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_sparse_dense, upg::Guarded<upg::sparse_dense>::call, upg::product_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_dense_sparse, upg::Guarded<upg::dense_sparse>::call, upg::product_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_decode, upg::Guarded<upg::decode>::call, upg::decode_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_sparse_dense_narrow, upg::Guarded<upg::sparse_dense_narrow>::call,
                              upg::product_binding().Attr<std::int32_t>("bits").Attr<std::int32_t>("group_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_decode_narrow, upg::Guarded<upg::decode_narrow>::call,
                              upg::decode_binding().Attr<std::int32_t>("bits").Attr<std::int32_t>("group_size"));
