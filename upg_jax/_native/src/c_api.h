// What Python calls through ctypes. Everything else in the library is hidden.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define UPG_API extern "C" __attribute__((visibility("default")))

// The version of this file, which upg_jax/_native/__init__.py has, too: arguments of a function are nowhere else to be seen.
UPG_API int upg_interface();

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

// The full check, and conversions between the forms of an index, of the rows from `first` up to `end`; verification.h and
// conversion.h say what each one does. `index` is the number of the form that comes in; its planes and results that a call
// does not use may be null. All return the first of the rows that does not allow it, or `end`.
struct UpgPlanes {
  const int8_t* values;
  const uint8_t* deltas;
  const uint16_t* primes;
  const uint32_t* row_pointers;
  size_t rows;
  size_t columns;
  size_t capacity;
  int32_t index;
};
UPG_API size_t upg_first_bad_row(const UpgPlanes*, size_t first, size_t end);
UPG_API size_t upg_first_bad_mask_row(const UpgPlanes*, size_t first, size_t end);
UPG_API size_t upg_mask_from_deltas(const UpgPlanes*, size_t first, size_t end, uint8_t* mask);
UPG_API size_t upg_deltas_from_mask(const UpgPlanes*, size_t first, size_t end, uint8_t* deltas);
UPG_API size_t upg_dense_from_deltas(const UpgPlanes*, size_t first, size_t end, size_t stride, size_t alignment,
                                     int8_t* values, uint16_t* primes);
UPG_API size_t upg_row_lengths_of_dense(const UpgPlanes*, size_t first, size_t end, size_t stride, size_t alignment,
                                        uint32_t* lengths);
UPG_API size_t upg_deltas_from_dense(const UpgPlanes*, size_t first, size_t end, size_t stride,
                                     const uint32_t* row_pointers, int8_t* values, uint8_t* deltas, uint16_t* primes);
