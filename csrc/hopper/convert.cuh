// Numbers of 8 bits to and from float32, and of 16 bits to float32 (attention/pack.cuh goes back), in pairs, the first one in the low bits. PTX ISA: "cvt".
#pragma once

#include <cstdint>

namespace jax_flashmla {

// To the nearest, ties to even; NaN becomes 0x7F.
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
__device__ __forceinline__ float2 from_bf16x2(uint32_t pair) { return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)); }
__device__ __forceinline__ float2 from_f16x2(uint32_t pair) {
  float2 x;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }" : "=f"(x.x), "=f"(x.y) : "r"(pair));
  return x;
}
__device__ __forceinline__ float2 from_e4m3x2(uint32_t codes) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(codes)));
  return from_f16x2(pair);
}

}  // namespace jax_flashmla
