// What the lanes of a warp do together.
#pragma once

#include <cuda_runtime_api.h>

namespace jax_flashmla {

// The sum over this lane and those below.
template <class T>
__device__ __forceinline__ T warp_scan(T value) {
  const int lane = threadIdx.x & 31;
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

}  // namespace jax_flashmla
