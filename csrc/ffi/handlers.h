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

// The stage "record" of the same (record.cc): what `kExecute` launches becomes kernels of XLA's command buffer.
XLA_FFI_Error* record(XLA_FFI_CallFrame* frame, XLA_FFI_Handler* execute);
template <XLA_FFI_Handler* kExecute>
XLA_FFI_Error* Record(XLA_FFI_CallFrame* frame) {
  return record(frame, kExecute);
}

struct Target {
  const char* name;
  XLA_FFI_Handler *execute, *record;
};
inline constexpr Target kTargets[] = {
    {"jax_flashmla.schedule.v2", Schedule, Record<Schedule>},
    {"jax_flashmla.dense_decode.v2", DenseDecode, Record<DenseDecode>},
    {"jax_flashmla.sparse_decode.v1", SparseDecode, Record<SparseDecode>},
    {"jax_flashmla.sparse_prefill.v1", SparsePrefill, Record<SparsePrefill>},
    {"jax_flashmla.append.v1", Append, Record<Append>},
    {"jax_flashmla.gather.v1", Gather, Record<Gather>},
};

// No op: when it is registered, it registers all targets with both stages.
XLA_FFI_Error* RegisterTargets(XLA_FFI_CallFrame* frame);

}  // namespace jax_flashmla
