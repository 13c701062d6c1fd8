#pragma once
#include "emulation.h"

namespace jax_flashmla {

inline float widen(uint32_t code, int mantissa, int bias) {
  const int exponent = int(code >> mantissa), fraction = int(code & ((1u << mantissa) - 1));
  return std::ldexp(float(exponent ? fraction + (1 << mantissa) : fraction), max(exponent, 1) - bias - mantissa);
}
inline uint32_t to_e4m3(float x) { return std::isnan(x) ? 0x7F : narrow(std::fabs(x), 3, 7, 0x7E) | std::signbit(x) << 7; }
inline float from_e4m3(uint32_t x) { return (x & 0x7F) == 0x7F ? NAN : std::copysign(widen(x & 0x7F, 3, 7), x & 0x80 ? -1.f : 1.f); }
inline float from_f16(uint32_t x) {
  const float size = (x & 0x7FFF) > 0x7C00 ? NAN : (x & 0x7FFF) == 0x7C00 ? INFINITY : widen(x & 0x7FFF, 10, 15);
  return std::copysign(size, x & 0x8000 ? -1.f : 1.f);
}

inline uint32_t to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline float2 from_bf16x2(uint32_t pair) { return {to_float(uint16_t(pair)), to_float(uint16_t(pair >> 16))}; }
inline float2 from_f16x2(uint32_t pair) { return {from_f16(pair & 0xFFFF), from_f16(pair >> 16)}; }
inline float2 from_e4m3x2(uint32_t codes) { return {from_e4m3(codes & 0xFF), from_e4m3(codes >> 8 & 0xFF)}; }

}  // namespace jax_flashmla
