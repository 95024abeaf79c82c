// The XLA FFI handlers, by name.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* upg_sparse_dense(XLA_FFI_CallFrame*);
XLA_FFI_Error* upg_dense_sparse(XLA_FFI_CallFrame*);
XLA_FFI_Error* upg_decode(XLA_FFI_CallFrame*);
XLA_FFI_Error* upg_attend(XLA_FFI_CallFrame*);
XLA_FFI_Error* upg_sparse_dense_narrow(XLA_FFI_CallFrame*);
XLA_FFI_Error* upg_decode_narrow(XLA_FFI_CallFrame*);
}
