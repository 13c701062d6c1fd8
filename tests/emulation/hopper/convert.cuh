#pragma once
#include "emulation.h"

namespace jax_flashmla {

// A magnitude as a number with so many bits of mantissa and this bias, to the nearest, ties to even, and no more than `most`.
inline uint32_t narrow(double size, int mantissa, int bias, uint32_t most) {
  if (size == 0) return 0;
  if (std::isinf(size)) return most;
  const int exponent = std::max(std::ilogb(size), 1 - bias);
  const auto steps = uint32_t(std::nearbyint(std::ldexp(size, mantissa - exponent)));
  return min(steps + (uint32_t(exponent + bias - 1) << mantissa), most);
}
inline float widen(uint32_t code, int mantissa, int bias) {
  const int exponent = int(code >> mantissa), fraction = int(code & ((1u << mantissa) - 1));
  return std::ldexp(float(exponent ? fraction + (1 << mantissa) : fraction), max(exponent, 1) - bias - mantissa);
}
inline uint32_t to_e4m3(float x) { return std::isnan(x) ? 0x7F : narrow(std::fabs(x), 3, 7, 0x7E) | std::signbit(x) << 7; }
inline uint32_t to_f16(float x) { return std::isnan(x) ? 0x7FFF : narrow(std::fabs(x), 10, 15, 0x7C00) | std::signbit(x) << 15; }
inline float from_e4m3(uint32_t x) { return (x & 0x7F) == 0x7F ? NAN : std::copysign(widen(x & 0x7F, 3, 7), x & 0x80 ? -1.f : 1.f); }
inline float from_f16(uint32_t x) {
  const float size = (x & 0x7FFF) > 0x7C00 ? NAN : (x & 0x7FFF) == 0x7C00 ? INFINITY : widen(x & 0x7FFF, 10, 15);
  return std::copysign(size, x & 0x8000 ? -1.f : 1.f);
}

inline uint32_t to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline uint32_t to_bf16x2(float low, float high) { return to_bfloat16(low).bits | uint32_t(to_bfloat16(high).bits) << 16; }
inline uint32_t to_f16x2(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
inline float2 from_bf16x2(uint32_t pair) { return {to_float(uint16_t(pair)), to_float(uint16_t(pair >> 16))}; }
inline float2 from_f16x2(uint32_t pair) { return {from_f16(pair & 0xFFFF), from_f16(pair >> 16)}; }
inline float2 from_e4m3x2(uint32_t codes) { return {from_e4m3(codes & 0xFF), from_e4m3(codes >> 8 & 0xFF)}; }

}  // namespace jax_flashmla
