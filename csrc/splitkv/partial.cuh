// Where the decode kernel leaves the partial result of a split, and combine finds it: in float16, a row's share of each output half (256 columns) divided by
// a power of two, so that its largest number lies in [2^14, 2^15) and all within 2^28 of it keep eleven bits. Half the bytes of float32, and what is
// lost is an eighth of what rounding the output to bfloat16 loses.
//
// The output lies in memory as a warp holds it, so that it leaves in whole 512-byte stores straight from the accumulators: a fragment is 16 rows x 16
// columns, of which lane l has as one uint4 row l/4 and row l/4 + 8 of columns 2(l%4) and + 1, then of these plus 8. The fragments of 16 rows are their 512
// columns in order.
//
// Dense decode hands its partial results over while it runs (relaxed.cuh): it first marks one uint4 in every line of 128 bytes, and the numbers that rows have
// of their own, as absent, and combine, which starts behind that, takes what is absent no more. The eight lanes that share a line store it by one
// instruction, and it arrives as one: NCCL's protocol LL128 relies on the same. Marks in every uint4 would do without that, but cost 64 rows 1 µs a call.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>

#include "attention/pack.cuh"
#include "attention/softmax.cuh"
#include "params.h"

namespace jax_flashmla {

inline constexpr int kFragmentRows = 16, kFragmentColumns = 16, kRowFragments = kDv / kFragmentColumns, kFragmentLanes = 32;
inline constexpr int kLineUnits = 8;  // uint4 in a line

// Of a row: the reference maximum (base 2) that its output was accumulated against, its sum, and what the numbers of each output half are to be multiplied by.
struct alignas(16) PartialStats {
  float reference, sum, scale[2];
};

// Of 16 rows of a KV head: `group` counts them.
__device__ __forceinline__ uint4* partial_fragments(const DecodeParams& p, int slot, int kv_head, int group) {
  const int64_t groups = (p.rows + kFragmentRows - 1) / kFragmentRows;
  return static_cast<uint4*>(p.partial_out) + ((int64_t(slot) * p.h_kv + kv_head) * groups + group) * (kRowFragments * kFragmentLanes);
}
__device__ __forceinline__ PartialStats* partial_stats(const DecodeParams& p, int slot, int kv_head, int row) {
  return static_cast<PartialStats*>(p.partial_stats) + (int64_t(slot) * p.h_kv + kv_head) * p.rows + row;
}

// The powers of two for this thread's two rows of an output half.
__device__ __forceinline__ void partial_scales(const float (&o)[128], float (&scale)[2]) {
  float top[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 128; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], fabsf(o[i]));  // NaN is never the larger one
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t exponent = __float_as_uint(quad_max(top[r])) >> 23;
    // Beside an infinity the other columns keep their numbers as they are. Else both the scale and 1 / scale are normal.
    scale[r] = __uint_as_float(exponent == 255 ? 127u << 23 : (max(exponent, 27u) - 14) << 23);
  }
}

// This thread's numbers of a fragment.
__device__ __forceinline__ uint4 pack_partial(const float* o, const float (&factor)[2]) {
  auto word = [&](int i) { return pack<__half>(o[2 * i] * factor[i & 1], o[2 * i + 1] * factor[i & 1]); };
  return make_uint4(word(0), word(1), word(2), word(3));
}

}  // namespace jax_flashmla
