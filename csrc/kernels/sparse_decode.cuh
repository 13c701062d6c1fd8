// Sparse MLA decode, sm_90a: the seesaw of seesaw.cuh, its K slots filled by gather_tokens.cuh with the tokens that a list of indices names.
#pragma once

#include "kernels/gather_tokens.cuh"
#include "kernels/sparse_decode.h"

namespace jax_flashmla::sparse_decode {

using namespace seesaw;  // NOLINT: this kernel is one of its two halves

template <class Tr, KVFormat kFormat, int kAlign>
__global__ void __launch_bounds__(kThreads, 1) sparse_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ SparseDecodeParams p) {
  extern __shared__ char raw[];
  attend<Tr, kFormat, kAlign>(q_map, p, *reinterpret_cast<Storage<Tr>*>(raw));
}

template <class T, int kDqk, KVFormat kFormat>
Status launch_sparse_decode(const SparseDecodeParams& p) {
  constexpr int kLeast = kFormat == KVFormat::kFp8V4 ? 8 : 16;  // rows in pages of an odd number of v4 tokens, which end in scales, are not aligned
  using Aligned = Traits<T, kDqk, keys_of(kFormat)>;
  using Other = Traits<T, kDqk, keys_of(kFormat, kLeast)>;
  if ((p.sources[0].page_bytes | p.sources[1].page_bytes) % 16 == 0) return launch_attend<Aligned>(sparse_decode_kernel<Aligned, kFormat, 16>, p);
  return launch_attend<Other>(sparse_decode_kernel<Other, kFormat, kLeast>, p);
}

}  // namespace jax_flashmla::sparse_decode
