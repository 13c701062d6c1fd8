// What the last step of a row depends on the kind of decode for: where its lse goes, and the attention sink.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/softmax.cuh"
#include "hopper/math.cuh"
#include "params.h"

namespace jax_flashmla {

template <class Params>
inline constexpr bool kSparse = std::is_base_of_v<SparseDecodeParams, Params>;

template <class Params>
__device__ __forceinline__ int64_t lse_index(const Params& p, int seq, int head, int token) {
  if constexpr (std::is_same_v<Params, SparsePrefillParams>) return int64_t(seq) * p.h_q + head;
  if constexpr (kSparse<Params>) return (int64_t(seq / p.tokens) * p.h_q + head) * p.tokens + seq % p.tokens;
  return (int64_t(seq) * p.h_q + head) * p.s_q + token;
}

// What the output is multiplied by: exp(lse) / (exp(lse) + exp(sink)). Only for rows that have a key: lse2 is not -inf.
template <class Params>
__device__ __forceinline__ float sink_factor(const Params& p, int seq, int head, float lse2) {
  if constexpr (std::is_same_v<Params, SparsePrefillParams>) head += seq % p.heads_kv * p.h_q;
  if constexpr (kSparse<Params>)
    if (p.attn_sink) return reciprocal_fast(1.f + exp2_fast(p.attn_sink[head] * kLog2E - lse2));
  return 1.f;
}

}  // namespace jax_flashmla
