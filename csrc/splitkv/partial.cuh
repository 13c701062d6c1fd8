// Where the decode kernel leaves the partial result of a split, and combine finds it. The output lies in memory as a warp holds it, so that it leaves in
// whole 512-byte stores straight from the accumulators: a fragment is 16 rows x 8 columns, of which lane l has rows l/4 and + 8, columns 2(l%4) and + 1 as
// one float4. The fragments of 16 rows are their 512 columns in order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace jax_flashmla {

inline constexpr int kFragmentRows = 16, kRowFragments = kDv / 8, kFragmentLanes = 32;

// Of 16 rows of a KV head: `group` counts them.
__device__ __forceinline__ float4* partial_fragments(const DecodeParams& p, int slot, int kv_head, int group) {
  const int64_t groups = (p.rows + kFragmentRows - 1) / kFragmentRows;
  return reinterpret_cast<float4*>(p.partial_out) + ((int64_t(slot) * p.h_kv + kv_head) * groups + group) * (kRowFragments * kFragmentLanes);
}
// The reference maximum m (base 2) that a row's output was accumulated against, and its sum l.
__device__ __forceinline__ float2* partial_stats(const DecodeParams& p, int slot, int kv_head, int row) {
  return reinterpret_cast<float2*>(p.partial_stats) + (int64_t(slot) * p.h_kv + kv_head) * p.rows + row;
}

}  // namespace jax_flashmla
