// Online softmax over a 64x64 tile of scores held by a warpgroup, in base 2, with a lazy reference maximum.
//
// Accumulator layout: warp w, lane l holds rows 16w + l/4 and + 8, columns 8i + 2(l%4) and + 1 as s[4i + 2r + e] (r row, e column).
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/pack.cuh"
#include "hopper/math.cuh"

namespace jax_flashmla {

// Probabilities are taken against a reference maximum that moves only when a row's true maximum outgrew it by this much (base 2). Rescaling the output
// tile costs a tenth of the block, so it must be rare; the result stays exact, because sum and output share the reference. 2^8 is far inside bf16,
// fp16 and float32.
inline constexpr float kReferenceSlack = 8.f;

// Scores come and lse goes in base e.
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// exp2(from - to), 1 when they are equal (also when both are -inf: no key seen yet).
__device__ __forceinline__ float rescale_factor(float from, float to) { return from == to ? 1.f : exp2_fast(from - to); }

// Masks what a query must not see: tokens at or past limit[r], and 16-token groups whose page is not valid.
__device__ __forceinline__ void mask_scores(float (&s)[32], int token0, const int (&limit)[2], uint32_t valid_groups) {
  const int column0 = token0 + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool valid = valid_groups >> (i / 2) & 1;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!valid || column0 + 8 * i + (e & 1) >= limit[e / 2]) s[4 * i + e] = -INFINITY;
  }
}

// Masks tokens whose bit is not set.
__device__ __forceinline__ void mask_scores(float (&s)[32], uint64_t valid) {
  valid >>= 2 * (threadIdx.x & 3);
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!(valid >> (8 * i + (e & 1)) & 1)) s[4 * i + e] = -INFINITY;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Of this thread's scores of a row.
__device__ __forceinline__ float row_maximum(const float (&s)[32], int r) {
  float top = s[2 * r];
#pragma unroll
  for (int i = 0; i < 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
  return top;
}

// Moves the reference of rows that outgrew it to their maximum, top[r] being that of this thread's scores; factor[r] is what their sum and output must be
// multiplied by. Uniform over the warp: true when any did. Rows do not look at each other: what a row comes to must not depend on its neighbours.
__device__ __forceinline__ bool update_reference(float (&top)[2], float scale_log2, float (&reference)[2], float (&factor)[2]) {
  auto outgrown = [&](int r) { return fmaf(top[r], scale_log2, -reference[r]) > kReferenceSlack; };  // false for -inf - -inf
  if (!__any_sync(~0u, outgrown(0) || outgrown(1))) return false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(top[r]);
    const bool grew = outgrown(r);
    factor[r] = grew ? exp2_fast(reference[r] - top[r] * scale_log2) : 1.f;
    if (grew) reference[r] = top[r] * scale_log2;
  }
  return true;
}

// Half `kPart` of s (32 columns) becomes probabilities, packed as half of the A operand of the output product; sum[r] += this thread's share of the row.
template <class T, int kPart>
__device__ __forceinline__ void probabilities(const float (&s)[32], float scale_log2, const float (&reference)[2], float (&sum)[2], uint32_t (&p)[16]) {
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) shift[r] = reference[r] == -INFINITY ? 0.f : reference[r];
#pragma unroll
  for (int i = 8 * kPart; i < 8 * (kPart + 1); ++i) {
    const int r = i & 1;
    const float a = exp2_fast(fmaf(s[2 * i], scale_log2, -shift[r])), b = exp2_fast(fmaf(s[2 * i + 1], scale_log2, -shift[r]));
    sum[r] += a + b;
    p[i] = pack<T>(a, b);
  }
}

// Multiplies the rows of an output half (64x256) by factor[r].
__device__ __forceinline__ void scale_rows(float (&o)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[4 * i + e] *= factor[e / 2];
}

}  // namespace jax_flashmla
