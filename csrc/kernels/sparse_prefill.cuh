// Sparse MLA prefill, sm_90a: sparse decode (the seesaw of seesaw.cuh, its K slots filled by gather_tokens.cuh) that also tells the largest score of each row.
#pragma once

#include "kernels/gather_tokens.cuh"
#include "kernels/sparse_prefill.h"

namespace jax_flashmla::sparse_prefill {

using namespace seesaw;  // NOLINT: this kernel is one of its two halves

template <class Tr, KVFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) sparse_prefill_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ SparsePrefillParams p) {
  extern __shared__ char raw[];
  attend<Tr, kFormat, 16>(q_map, p, *reinterpret_cast<Storage<Tr>*>(raw));
}

template <class T, int kDqk, KVFormat kFormat>
Status launch_sparse_prefill(const SparsePrefillParams& p) {
  using Tr = Traits<T, kDqk, keys_of(kFormat), true>;
  // Where both of two row tiles want rows that L2 has not. One tile alone is at the limit of the memory, and rows that L2 has come as fast without.
  SparsePrefillParams own = p;
  own.prefetch = p.rows > kRowTile && p.sources[0].slots * Tr::kSubTiles * 128 > l2_bytes();
  return launch_attend<Tr>(sparse_prefill_kernel<Tr, kFormat>, own);
}

}  // namespace jax_flashmla::sparse_prefill
