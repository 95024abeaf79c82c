#include "c_api.h"

#include "conversion.h"
#include "dispatch.h"
#include "ffi_handlers.h"
#include "plan.h"
#include "verification.h"

namespace {

struct Handler {
  const char* name;
  XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*);
};

// Names carry a version: a compiled program that was saved with one must never meet other operands or scratch memory.
constexpr Handler handlers[] = {
    {"upg_jax.sparse_dense.v2", upg_sparse_dense},
    {"upg_jax.dense_sparse.v2", upg_dense_sparse},
    {"upg_jax.decode.v3", upg_decode},
    {"upg_jax.attend.v1", upg_attend},
    {"upg_jax.sparse_dense_narrow.v1", upg_sparse_dense_narrow},
    {"upg_jax.decode_narrow.v1", upg_decode_narrow},
};

upg::Layer layer_of(const UpgPlanes* p) {
  return {p->values, p->deltas,  p->primes,   nullptr,                          p->row_pointers,
          p->rows,   p->columns, p->capacity, static_cast<upg::Index>(p->index)};
}

}  // namespace

int upg_interface() { return 2; }

int upg_ffi_api_major() { return XLA_FFI_API_MAJOR; }
int upg_ffi_api_minor() { return XLA_FFI_API_MINOR; }

const char* upg_handler_name(size_t i) { return i < std::size(handlers) ? handlers[i].name : nullptr; }
void* upg_handler(size_t i) { return i < std::size(handlers) ? reinterpret_cast<void*>(handlers[i].call) : nullptr; }

const char* upg_usable_kernels(size_t i) {
  const auto& usable = upg::usable_kernels();
  return i < usable.size() ? usable[i]->name : nullptr;
}
const char* upg_kernels() { return upg::kernels().name; }
int upg_choose_kernels(const char* name) { return upg::choose_kernels(name); }

size_t upg_scratch_floats(int transposed, size_t groups, size_t vectors, size_t rows, size_t columns,
                          size_t capacity, int index) {
  upg::Stack stack{};
  stack.first.rows = rows;
  stack.first.columns = columns;
  stack.first.capacity = capacity;
  stack.first.index = static_cast<upg::Index>(index);
  stack.groups = groups;
  return transposed ? upg::transposed_scratch(stack, vectors) : upg::product_scratch(stack, vectors);
}

size_t upg_first_row_outside(const uint8_t* deltas, const uint32_t* row_pointers, size_t rows, size_t columns,
                             size_t capacity) {
  return upg::kernels().first_row_outside({nullptr, deltas, nullptr, nullptr, row_pointers, rows, columns, capacity});
}

size_t upg_first_bad_row(const UpgPlanes* p, size_t first, size_t end) {
  return upg::first_bad_row(layer_of(p), {first, end});
}
size_t upg_first_bad_mask_row(const UpgPlanes* p, size_t first, size_t end) {
  return upg::first_bad_mask_row(layer_of(p), {first, end});
}
size_t upg_mask_from_deltas(const UpgPlanes* p, size_t first, size_t end, uint8_t* mask) {
  return upg::mask_from_deltas(layer_of(p), {first, end}, mask);
}
size_t upg_deltas_from_mask(const UpgPlanes* p, size_t first, size_t end, uint8_t* deltas) {
  return upg::deltas_from_mask(layer_of(p), {first, end}, deltas);
}
size_t upg_dense_from_deltas(const UpgPlanes* p, size_t first, size_t end, size_t stride, size_t alignment,
                             int8_t* values, uint16_t* primes) {
  return upg::dense_from_deltas(layer_of(p), {first, end}, stride, alignment, values, primes);
}
size_t upg_row_lengths_of_dense(const UpgPlanes* p, size_t first, size_t end, size_t stride, size_t alignment,
                                uint32_t* lengths) {
  upg::row_lengths_of_dense(layer_of(p), {first, end}, stride, alignment, lengths);
  return end;
}
size_t upg_deltas_from_dense(const UpgPlanes* p, size_t first, size_t end, size_t stride,
                             const uint32_t* row_pointers, int8_t* values, uint8_t* deltas, uint16_t* primes) {
  upg::deltas_from_dense(layer_of(p), {first, end}, stride, row_pointers, values, deltas, primes);
  return end;
}
