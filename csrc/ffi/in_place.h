// Results that are to be the buffer of an operand. They are not where XLA has a call write into a slice of something larger, as it may in a scan: what the
// operand holds is copied first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "hopper/recording.h"
#include "params.h"

namespace jax_flashmla {

inline Status copy_unless_in_place(void* result, const void* operand, size_t bytes, Stream stream) {
  if (result == operand) return nullptr;
  if (recording) {
    recording->incomplete = true;
    return nullptr;
  }
  const cudaError_t err = cudaMemcpyAsync(result, operand, bytes, cudaMemcpyDeviceToDevice, stream);
  return err == cudaSuccess ? nullptr : cudaGetErrorString(err);
}

}  // namespace jax_flashmla
