// Sixteen or eight bytes to anywhere. PTX ISA: "st".
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flashmla {

__device__ __forceinline__ void scatter16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void scatter8(void* p, uint2 v) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory"); }

}  // namespace jax_flashmla
