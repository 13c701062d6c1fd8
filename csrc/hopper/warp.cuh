// What the lanes of a warp do together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flashmla {

struct Plus {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The sum over this lane and those below; `plus` must be associative.
template <class T, class Sum = Plus>
__device__ __forceinline__ T warp_scan(T value, Sum plus = {}) {
  const int lane = threadIdx.x & 31;
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value = plus(value, other);
  }
  return value;
}

// True in one lane. Behind it the compiler knows that there is one, and asks the copy engine without a loop over lanes. PTX ISA: "elect.sync".
__device__ __forceinline__ bool elect() {
  uint32_t one;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(one));
  return one != 0;
}

}  // namespace jax_flashmla
