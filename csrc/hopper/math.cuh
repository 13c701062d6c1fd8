// PTX ISA: "ex2", "lg2", "rcp", "mul" of bf16x2, which keeps subnormal numbers, "prmt".
#pragma once

#include <cstdint>

namespace jax_flashmla {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To within 2^-22, absolutely for arguments between 0.5 and 2 and relatively elsewhere.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To within a unit in the last place; of subnormal numbers infinity.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// Byte i of the result is the one that digit i of the selector names; plus 8: its sign, eight times. (__byte_perm ignores the 8.)
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}

}  // namespace jax_flashmla
