// What Python calls through ctypes. Everything else in the library is hidden.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define UPG_API extern "C" __attribute__((visibility("default")))

// The version of XLA's FFI that the handlers were built for.
UPG_API int upg_ffi_api_major();
UPG_API int upg_ffi_api_minor();

// The i-th handler's name and function, or null past the last.
UPG_API const char* upg_handler_name(size_t i);
UPG_API void* upg_handler(size_t i);

// The i-th usable set of kernels, best first, or null past the last; the one in use; and choosing one by name.
UPG_API const char* upg_usable_kernels(size_t i);
UPG_API const char* upg_kernels();
UPG_API int upg_choose_kernels(const char* name);

// Floats of scratch memory that a product needs.
UPG_API size_t upg_scratch_floats(int transposed, size_t groups, size_t vectors, size_t rows, size_t columns,
                                  size_t capacity, int index);

// The first row whose last column is not below `columns`, or `rows`. Row pointers may hold anything.
UPG_API size_t upg_first_row_outside(const uint8_t* deltas, const uint32_t* row_pointers, size_t rows, size_t columns,
                                     size_t capacity);
