#pragma once
#include "emulation.h"

namespace jax_flashmla {
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return uint32_t(to_bfloat16(to_float(uint16_t(a)) * to_float(uint16_t(b))).bits) |
         uint32_t(to_bfloat16(to_float(uint16_t(a >> 16)) * to_float(uint16_t(b >> 16))).bits) << 16;
}
inline uint32_t permute_bytes(uint32_t x, uint32_t selector) {
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15, byte = digit & 4 ? 0 : x >> 8 * (digit & 3) & 0xFF;
    y |= (digit & 8 ? byte & 0x80 ? 0xFFu : 0u : byte) << 8 * i;
  }
  return y;
}
}  // namespace jax_flashmla
