// Moving accumulator fragments: probabilities to shared memory, output rows to global memory. Layout of an accumulator: see softmax.cuh.
#pragma once

#include <cstdint>

#include "attention/softmax.cuh"
#include "hopper/barrier.cuh"

namespace jax_flashmla {

// Writes this warp's 16 rows of packed probabilities into a 64x64 tile with 128-byte swizzle: the A operand of a product in the other warpgroup.
__device__ __forceinline__ void store_probabilities(void* tile, int warp, int lane, const uint32_t (&p)[16]) {
  const int row = 16 * warp + (lane & 15), half = lane >> 4;
  const uint32_t address = smem_address(tile) + row * 128;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address + (((2 * k + half) ^ (row & 7)) << 4)), "r"(p[4 * k]),
                 "r"(p[4 * k + 1]), "r"(p[4 * k + 2]), "r"(p[4 * k + 3])
                 : "memory");
}

// Transposes 4x4 words over the four lanes of a quad: lane q ends with word q of every lane.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4], int q) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = q & step;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int low = step == 1 ? 2 * k : k, high = low + step;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? v[low] : v[high], step);
      (upper ? v[low] : v[high]) = got;
    }
  }
}

// One row of an output half, 256 columns over a quad, in T: four 8-column groups at a time, so that each lane writes 16 bytes and a quad 64.
template <class T>
__device__ __forceinline__ void store_row(T* row, const float (&o)[128], int r, float factor, int lane, bool valid) {
  const int q = lane & 3;
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    uint32_t v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = 4 * (4 * group + k) + 2 * r;
      v[k] = pack<T>(o[i] * factor, o[i + 1] * factor);
    }
    quad_transpose(v, q);
    if (valid) *reinterpret_cast<uint4*>(row + (4 * group + q) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// The same in float32: a quad writes a full 32-byte sector as it is.
__device__ __forceinline__ void store_row(float* row, const float (&o)[128], int r, float factor, int lane, bool valid) {
  if (!valid) return;
#pragma unroll
  for (int i = 0; i < 32; ++i) *reinterpret_cast<float2*>(row + 8 * i + 2 * (lane & 3)) = make_float2(o[4 * i + 2 * r] * factor, o[4 * i + 2 * r + 1] * factor);
}

// The 16-row slice of a warp of A[64, 64] as register operand, straight from global memory; rows without a pointer are zero.
__device__ __forceinline__ void load_fragment(uint32_t (&a)[16], const void* row0, const void* row1, int lane) {
  const uint32_t* p[2] = {static_cast<const uint32_t*>(row0) + (lane & 3), static_cast<const uint32_t*>(row1) + (lane & 3)};
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j) a[4 * k + j] = (j & 1 ? row1 : row0) ? p[j & 1][8 * k + 4 * (j >> 1)] : 0u;
}

}  // namespace jax_flashmla
