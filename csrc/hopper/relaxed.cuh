// Numbers handed to a kernel that runs already, which sees by themselves that they are there: before, there was kAbsent. PTX ISA: "ld", "st" with .relaxed,
// "Memory Consistency Model".
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flashmla {

inline constexpr uint32_t kAbsent = ~0u;  // as a float or two halves NaN, but not the one that arithmetic makes

__device__ __forceinline__ void store_relaxed(uint4* to, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_relaxed(float2* to, const float2& v) {
  asm volatile("{\n.reg .b64 both;\nmov.b64 both, {%1, %2};\nst.relaxed.gpu.global.b64 [%0], both;\n}" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_relaxed(float* to, float v) { asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "f"(v) : "memory"); }

// Zeros where there is nothing to load.
__device__ __forceinline__ uint4 load_relaxed(const uint4* from, bool there) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@there ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(unsigned(there))
      : "memory");
  return v;
}
__device__ __forceinline__ float load_relaxed(const float* from, bool there) {
  float v;
  asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\nmov.f32 %0, 0f00000000;\n@there ld.relaxed.gpu.global.f32 %0, [%1];\n}"
               : "=&f"(v)
               : "l"(from), "r"(unsigned(there))
               : "memory");
  return v;
}

// Nothing that is computed of these leaves a loop that calls this.
__device__ __forceinline__ void keep_inside() {}
template <class T, class... Rest>
__device__ __forceinline__ void keep_inside(T& x, Rest&... rest) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
  keep_inside(rest...);
}

}  // namespace jax_flashmla
