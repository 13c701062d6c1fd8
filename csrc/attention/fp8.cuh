// e4m3 numbers times a scale, as bfloat16: the product is rounded once, as from float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/pack.cuh"
#include "hopper/math.cuh"

namespace jax_flashmla {

// The float32 of an e8m0 code: 2^(code - 127), 255 is NaN.
__device__ __forceinline__ float e8m0(uint32_t code) { return __uint_as_float(code == 0 ? 0x00400000 : code == 255 ? 0x7FC00000 : code << 23); }

// The bits of an e4m3 number, its sign apart from the other seven, are those of a bfloat16 2^120 times smaller: so where bfloat16 holds scale x 2^120 exactly,
// as it does for nearly all powers of two, one multiplication does everything. Two such multipliers.
struct Fp8Scales {
  uint32_t multipliers;
  bool exact;

  // One scale, twice.
  static __device__ __forceinline__ Fp8Scales of_float(uint32_t bits) {
    return {permute_bytes(__float_as_uint(__uint_as_float(bits) * 0x1p120f), 0x3232), (bits & 0xFFFF) == 0 && (bits & 0x7FFFFFFF) < (127u + 8) << 23};
  }
  static __device__ __forceinline__ Fp8Scales of_e8m0(uint32_t low, uint32_t high) {
    return {(low + 120) << 7 | (high + 120) << 23, low < 127 + 8 && high < 127 + 8};
  }
};

// Sixteen codes become bfloat16. The code of NaN comes out as 480, which it would be in a format without NaN: looking for it takes a sixth of the kernel's
// time.
__device__ __forceinline__ void dequantize(uint4 (&out)[2], const uint4& codes, uint32_t multiplier) {
  // Two codes become halves of 16 bits, each with the sign all over its upper byte.
  auto pair = [&](uint32_t x, uint32_t selector) { return multiply_bf16x2(permute_bytes(x, selector) << 4 & 0x87F087F0, multiplier); };
  auto eight = [&](uint32_t x, uint32_t y) { return make_uint4(pair(x, 0x9180), pair(x, 0xB3A2), pair(y, 0x9180), pair(y, 0xB3A2)); };
  out[0] = eight(codes.x, codes.y), out[1] = eight(codes.z, codes.w);
}

// The same for any scale.
__device__ __forceinline__ void dequantize_slowly(uint4 (&out)[2], uint4 codes, float scale) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t code = codes.x >> (8 * e) & 0xFF;
      x[e] = __uint_as_float((code & 0x80) << 24 | (code & 0x7F) << 20) * 0x1p120f * scale;
    }
    out[0] = make_uint4(out[0].z, out[0].w, out[1].x, out[1].y);
    out[1] = make_uint4(out[1].z, out[1].w, pack<__nv_bfloat16>(x[0], x[1]), pack<__nv_bfloat16>(x[2], x[3]));
    codes = make_uint4(codes.y, codes.z, codes.w, 0);
  }
}

}  // namespace jax_flashmla
