// Merges partial results: out = sum_s 2^(lse_s - lse) out_s, lse = log2 sum_s 2^lse_s, in float32 and in a fixed order.
//
// A job is `rows_per_job` packed rows of one sequence. Up to kWarps splits: a warp per row, splits in order. More: all warps share a row, warp w taking
// splits w, w + 8, ..., and their sums are added in warp order. Which of the two depends on the number of splits alone, so that a batch-invariant plan
// gives batch-invariant bits; rows per job and the division of columns change no sum.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "attention/softmax.cuh"
#include "hopper/launch.cuh"
#include "splitkv/combine.h"

namespace jax_flashmla {
namespace {

constexpr int kWarps = 8, kChunk = 128, kChunks = kDv / kChunk;  // a warp reads 128 columns as one float4 per lane
constexpr int kSms = 132, kMaxCtas = 4 * kSms;                   // what a card holds at once; each then does several jobs

__device__ __forceinline__ void add_scaled(float4& a, float w, const float4& v) {
  a.x = fmaf(w, v.x, a.x), a.y = fmaf(w, v.y, a.y), a.z = fmaf(w, v.z, a.z), a.w = fmaf(w, v.w, a.w);
}

// kPerWarp: column chunks that a warp holds at once; the other chunks are jobs of their own.
template <class T, int kPerWarp>
__device__ __forceinline__ void combine_rows(const DenseDecodeParams& p, int seq, int first_row, int rows_per_job, int chunk0) {
  __shared__ float4 shared[kWarps][kPerWarp][32];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int first = p.num_splits[seq], splits = min(p.num_splits[seq + 1], p.slots) - first;
  if (first < 0 || splits < 2) return;
  const bool share = splits > kWarps;
  const int start = share ? warp : 0, stride = share ? kWarps : 1;  // this warp's splits
  const int total_rows = p.h_kv * p.rows, row_end = min(first_row + rows_per_job, total_rows);
  for (int row = first_row + (share ? 0 : warp); row < row_end; row += share ? 1 : kWarps) {
    const float* lse_of = p.partial_lse + int64_t(first) * total_rows + row;  // split s: + s * total_rows
    const auto* out_of = reinterpret_cast<const float4*>(p.partial_out + (int64_t(first) * total_rows + row) * kDv) + chunk0 * (kChunk / 4) + lane;
    const int64_t split_stride = int64_t(total_rows) * (kDv / 4);
    // The first two splits are on their way while the weights are computed.
    float4 ahead[2][kPerWarp];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c)
        if (start + k * stride < splits) ahead[k][c] = out_of[(start + k * stride) * split_stride + c * (kChunk / 4)];

    float top = -INFINITY, sum = 0.f;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, lse_of[int64_t(s) * total_rows]);
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int s = lane; s < splits; s += 32) {
      const float l = lse_of[int64_t(s) * total_rows];
      sum += l == -INFINITY ? 0.f : exp2_fast(l - top);
    }
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    const float lse = sum == 0.f ? -INFINITY : top + log2f(sum);
    auto weight = [&](int s) {
      const float l = lse_of[int64_t(s) * total_rows];
      return l == -INFINITY ? 0.f : exp2_fast(l - lse);  // an empty split wrote zeros
    };

    float4 acc[kPerWarp] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (start + k * stride < splits) {
        const float w = weight(start + k * stride);
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c) add_scaled(acc[c], w, ahead[k][c]);
      }
#pragma unroll(kPerWarp == 1 ? 4 : 1)
    for (int s = start + 2 * stride; s < splits; s += stride) {
      const float w = weight(s);
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c) add_scaled(acc[c], w, out_of[s * split_stride + c * (kChunk / 4)]);
    }
    if (share) {
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c) shared[warp][c][lane] = acc[c];
      __syncthreads();
      if (warp == 0) {
        for (int w = 1; w < kWarps; ++w)
#pragma unroll
          for (int c = 0; c < kPerWarp; ++c) add_scaled(acc[c], 1.f, shared[w][c][lane]);
      }
      __syncthreads();
    }
    if (share && warp != 0) continue;

    const int r = row % p.rows, token = r / p.group, head = row / p.rows * p.group + r % p.group;
    auto* out = reinterpret_cast<uint2*>(static_cast<T*>(p.out) + ((int64_t(seq) * p.s_q + token) * p.h_q + head) * kDv) + lane;
#pragma unroll
    for (int c = 0; c < kPerWarp; ++c) out[(chunk0 + c) * (kChunk / 4)] = make_uint2(pack<T>(acc[c].x, acc[c].y), pack<T>(acc[c].z, acc[c].w));
    if (chunk0 == 0 && lane == 0) p.lse[(int64_t(seq) * p.h_q + head) * p.s_q + token] = lse * kLn2;
  }
}

template <class T, int kPerWarp>
__global__ void __launch_bounds__(kWarps * 32) combine_kernel(const __grid_constant__ DenseDecodeParams p, int sequences, int rows_per_job) {
  wait_for_predecessor();
  let_successor_start();
  if (p.num_splits[p.b] == 0) return;  // nothing was split
  constexpr int kColumnJobs = kChunks / kPerWarp;
  const int row_jobs = (p.h_kv * p.rows + rows_per_job - 1) / rows_per_job;
  for (int64_t job = blockIdx.x; job < int64_t(sequences) * row_jobs * kColumnJobs; job += gridDim.x) {
    const int column = job % kColumnJobs, row = job / kColumnJobs % row_jobs, x = job / kColumnJobs / row_jobs;
    // Sequence x, or, where there are more sequences than parts, the one whose split 1 is at the start of part x + 1.
    int seq = x;
    if (p.b >= p.num_parts) {
      const Part part = p.metadata[x + 1];
      seq = part.begin_split == 1 ? part.begin_seq : -1;
    }
    if (seq >= 0 && seq < p.b) combine_rows<T, kPerWarp>(p, seq, row * rows_per_job, rows_per_job, column * kPerWarp);
  }
}

template <class T>
cudaError_t launch_combine(const DenseDecodeParams& p) {
  const int sequences = std::min(p.b, p.num_parts - 1), total_rows = p.h_kv * p.rows;
  // Many splits of a sequence: all warps share a row. Few: a row each. Little to do in all: columns are spread over CTAs too, for latency.
  const int rows_per_job = p.num_parts / p.b > kWarps ? 1 : kWarps;
  const int64_t row_jobs = int64_t(sequences) * ((total_rows + rows_per_job - 1) / rows_per_job);
  const bool thin = row_jobs <= kSms;
  const int64_t jobs = row_jobs * (thin ? kChunks : 1);
  const auto kernel = thin ? combine_kernel<T, 1> : combine_kernel<T, kChunks>;
  return launch(kernel, unsigned(std::min<int64_t>(jobs, kMaxCtas)), kWarps * 32, 0, p.stream, p, sequences, rows_per_job);
}

}  // namespace

Status run_combine(const DenseDecodeParams& p) {
  const cudaError_t err = p.dtype == Dtype::kBF16 ? launch_combine<__nv_bfloat16>(p) : launch_combine<__half>(p);
  return err == cudaSuccess ? nullptr : cudaGetErrorString(err);
}

}  // namespace jax_flashmla
