// Attention and combine as calls of their own (jax_flashmla/ops/splitkv.py says when): the second one finds here what the first one left.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "ffi/check.h"
#include "hopper/recording.h"
#include "params.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

inline Status copy(void* to, const void* from, size_t bytes, Stream stream) {
  if (to == from) return nullptr;
  if (recording) recording->incomplete = true;
  if (recording) return nullptr;
  const cudaError_t err = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return err == cudaSuccess ? nullptr : cudaGetErrorString(err);
}

struct Results {
  void *out, *partial_out, *partial_stats;
  float* lse;
};

// The call that combines takes the results of the other one as further operands. Out and lse are complete but for sequences that were split, and its own are
// to be the same buffers. They are not where XLA has a call write into a slice of something larger, as in a scan: then they are copied.
inline ffi::Error find_results(Results& to, Phase phase, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> lse,
                               ffi::ResultBuffer<ffi::F16> partial_out, ffi::ResultBuffer<ffi::F32> partial_stats, Stream stream) {
  to = {out->untyped_data(), partial_out->untyped_data(), partial_stats->untyped_data(), lse->typed_data()};
  FFI_CHECK(phase == Phase::kAll || phase == Phase::kAttend || phase == Phase::kCombine, "phase: 0, 1 or 2");
  FFI_CHECK(rest.size() == (phase == Phase::kCombine ? 4 : 0), "phase: the results of attention are operands of combine, and of nothing else");
  if (phase != Phase::kCombine) return ffi::Error::Success();
  const size_t bytes[4] = {out->size_bytes(), lse->size_bytes(), partial_out->size_bytes(), partial_stats->size_bytes()};
  void* left[4];
  for (size_t i = 0; i < 4; ++i) {
    const auto operand = rest.get<ffi::AnyBuffer>(i);
    FFI_CHECK(operand.has_value() && operand->size_bytes() == bytes[i], "phase: combine has the results of attention as operands");
    left[i] = operand->untyped_data();
  }
  to.partial_out = left[2], to.partial_stats = left[3];
  FFI_LAUNCH(copy(to.out, left[0], bytes[0], stream));
  FFI_LAUNCH(copy(to.lse, left[1], bytes[1], stream));
  return ffi::Error::Success();
}

}  // namespace jax_flashmla
