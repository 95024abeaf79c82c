#include "c_api.h"

#include "dispatch.h"
#include "ffi_handlers.h"
#include "plan.h"

namespace {

struct Handler {
  const char* name;
  XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*);
};

// Names carry a version: a compiled program that was saved with one must never meet other operands or scratch memory.
constexpr Handler handlers[] = {
    {"upg_jax.sparse_dense.v2", upg_sparse_dense},
    {"upg_jax.dense_sparse.v2", upg_dense_sparse},
    {"upg_jax.decode.v2", upg_decode},
};

}  // namespace

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
