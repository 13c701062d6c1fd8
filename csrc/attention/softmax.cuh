// Online softmax over a 64x64 tile of scores held by a warpgroup, in base 2, with a lazy reference maximum.
//
// Accumulator layout: warp w, lane l holds rows 16w + l/4 and + 8, columns 8i + 2(l%4) and + 1 as s[4i + 2r + e] (r row, e column).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace jax_flashmla {

// Probabilities are taken against a reference maximum that moves only when a thread's share of a row's sum over a block shows that it was outgrown.
// Rescaling the output tile costs a tenth of the block, so it must be rare; the result stays exact, because sum and output share the reference. 2^8 is far
// inside bf16, fp16 and float32.
inline constexpr float kReferenceSlack = 256.f;

// Scores come and lse goes in base e.
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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

// Raises the reference of rows that any lane of their quad says were outgrown to their maximum; factor[r] is what sum and output must be multiplied by.
// Rows do not look at each other: what a row comes to must not depend on its neighbours.
__device__ __forceinline__ void raise_reference(const float (&s)[32], float scale_log2, const bool (&outgrown)[2], float (&reference)[2], float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool row_outgrown = __ballot_sync(~0u, outgrown[r]) >> (threadIdx.x & 28) & 15;
    float top = s[2 * r];
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale_log2;
    const bool grew = row_outgrown && top > reference[r];
    factor[r] = grew ? exp2_fast(reference[r] - top) : 1.f;
    if (grew) reference[r] = top;
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float a, float b) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}

// exp2(s - shift), packed as the A operand of the output product; sum[r] is this thread's share of the row.
template <class T>
__device__ __forceinline__ void exponentiate(const float (&s)[32], float scale_log2, const float (&shift)[2], float (&sum)[2], uint32_t (&p)[16]) {
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int r = i & 1;
    const float a = exp2_fast(fmaf(s[2 * i], scale_log2, -shift[r])), b = exp2_fast(fmaf(s[2 * i + 1], scale_log2, -shift[r]));
    sum[r] += a + b;
    p[i] = pack<T>(a, b);
  }
}

// s becomes probabilities p, and sum[r] the running share of the row. No maximum is taken as long as the sums of the block show that no score outgrew
// the reference by much; else every row's reference is raised and the block done again. Uniform over the warp: true when it was, and then
// the output so far must be multiplied by factor[r].
template <class T>
__device__ __forceinline__ bool softmax_step(const float (&s)[32], float scale_log2, float (&reference)[2], float (&factor)[2], float (&sum)[2],
                                             uint32_t (&p)[16]) {
  float block_sum[2];
  exponentiate<T>(s, scale_log2, reference, block_sum, p);
  // A reference of -inf gives inf or NaN here, a score too large at least a large sum.
  const bool outgrown[2] = {!(block_sum[0] <= kReferenceSlack), !(block_sum[1] <= kReferenceSlack)};
  const bool moved = __any_sync(~0u, outgrown[0] || outgrown[1]);
  if (moved) {
    raise_reference(s, scale_log2, outgrown, reference, factor);
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = reference[r] == -INFINITY ? 0.f : reference[r], sum[r] *= factor[r];
    exponentiate<T>(s, scale_log2, shift, block_sum, p);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] += block_sum[r];
  return moved;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Multiplies the rows of an output half (64x256) by factor[r].
__device__ __forceinline__ void scale_rows(float (&o)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[4 * i + e] *= factor[e / 2];
}

}  // namespace jax_flashmla
