// Moving accumulator fragments: probabilities to shared memory, output rows to global memory. Layout of an accumulator: see softmax.cuh.
#pragma once

#include <cstdint>

#include "attention/softmax.cuh"
#include "hopper/shared.cuh"

namespace jax_flashmla {

// Writes 16 columns of this warp's 16 rows, an A operand of a product, into a 64x64 tile with 128-byte swizzle.
__device__ __forceinline__ void store_fragment(void* tile, int warp, int lane, int k, const uint32_t* p) {
  const int row = 16 * warp + (lane & 15), half = lane >> 4;
  store_matrices(smem_address(tile) + row * 128 + (((2 * k + half) ^ (row & 7)) << 4), p[0], p[1], p[2], p[3]);
}
// Writes this warp's 16 rows of an output half (64x256, times factor[r]) through its 2 KB of a tile in shared memory, so that every store is 128 contiguous
// bytes of a row. index_of(i) is the row of `out` that row i of the 16 goes to, -1 for none; all lanes must call.
template <class T, class IndexOf>
__device__ __forceinline__ void store_rows(T* out, int stride, void* tile, int warp, const float (&o)[128], const float (&factor)[2], IndexOf index_of) {
  const int lane = lane_again();  // so that the compiler does not carry the addresses below in registers through the main loop
  const uint32_t own = smem_address(tile) + warp * 2048;
  int index[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) index[j] = index_of(4 * j + lane / 8);
  out += (lane & 7) * 8;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* part = o + 32 * c + 8 * k;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack<T>(part[2 * i] * factor[i & 1], part[2 * i + 1] * factor[i & 1]);
      store_fragment(tile, warp, lane, k, words);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 4 * j + lane / 8;
      const uint4 v = load_shared(own + row * 128 + (((lane & 7) ^ (row & 7)) << 4));
      if (index[j] >= 0) *reinterpret_cast<uint4*>(out + int64_t(index[j]) * stride + c * 64) = v;
    }
    __syncwarp();
  }
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
