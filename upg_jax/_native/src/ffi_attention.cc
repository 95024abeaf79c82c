#include <algorithm>

#include "ffi_call.h"
#include "ffi_handlers.h"
#include "ffi_operands.h"

namespace upg {
namespace {

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

}  // namespace
}  // namespace upg

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_attend, upg::Guarded<upg::attend>::call,
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
