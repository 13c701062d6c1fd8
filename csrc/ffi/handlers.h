// The handlers that module.cc registers, one per op.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_flashmla {

extern "C" {
XLA_FFI_Error* Schedule(XLA_FFI_CallFrame*);
XLA_FFI_Error* DenseDecode(XLA_FFI_CallFrame*);
XLA_FFI_Error* SparseDecode(XLA_FFI_CallFrame*);
XLA_FFI_Error* SparsePrefill(XLA_FFI_CallFrame*);
XLA_FFI_Error* Append(XLA_FFI_CallFrame*);
XLA_FFI_Error* Gather(XLA_FFI_CallFrame*);
}

}  // namespace jax_flashmla
