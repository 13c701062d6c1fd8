// Merges, inside the decode kernel, the partial results of the sequences that the schedule split:
//
//   out = sum_s 2^(lse_s - lse) out_s,   lse = log2 sum_s 2^lse_s,   in float32 and in a fixed order
//
// A CTA that is through with all of its pieces arrives at a counter for each split sequence that it had a piece of. The merge is done by those that found
// every piece of the sequence already started: they wait for the rest to arrive and share the rows. A CTA therefore waits only for CTAs that run, and none
// of those waits before it has arrived: nobody depends on who is resident. Where nobody could wait, the last to arrive merges alone. How many help
// decides who adds up what, never in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/softmax.cuh"
#include "hopper/barrier.cuh"
#include "hopper/counter.cuh"
#include "params.h"

namespace jax_flashmla {

// A counter holds three numbers of CTAs. A part has at most two split sequences: the one it begins in and the one it ends in.
inline constexpr uint64_t kHelper = 1, kArrived = 1ull << 21, kStarted = 1ull << 42;
__device__ __forceinline__ int count_of(uint64_t counter, uint64_t unit) { return int(counter / unit & (kArrived - 1)); }

// In shared memory.
struct SplitSequences {
  int seq[2], first_slot[2], splits[2];  // splits = 0: there is none, or it is not split
  int order[2], helpers[2];              // this CTA is number `order` of `helpers`; 0: others merge
};

constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * 32;
constexpr int kChunk = 128, kChunks = kDv / kChunk;  // columns that a warp reads as one float4 per lane
constexpr int kMergeScratch = kMergeThreads * kChunks * sizeof(float4);

template <class Cta>
__device__ __forceinline__ uint64_t& split_counter(const Cta& cta, int first_slot) {
  return cta.p.counters[(int64_t(first_slot) * cta.p.h_kv + cta.kv_head()) * gridDim.x + blockIdx.x];
}

// One thread, early.
template <class Cta>
__device__ __forceinline__ void announce_splits(const Cta& cta, SplitSequences& own) {
  const int begin = cta.part.begin_seq, last = cta.last_seq();
  for (int i = 0; i < 2; ++i) {
    const int seq = i == 0 ? begin : last;
    own.splits[i] = own.helpers[i] = 0;
    if (begin > last || (i == 1 && last == begin)) continue;
    const int first = cta.p.num_splits[seq], splits = cta.p.num_splits[seq + 1] - first;
    if (splits <= 0 || first < 0 || splits > cta.p.slots - first) continue;  // not split, or a made-up plan
    own.seq[i] = seq, own.first_slot[i] = first, own.splits[i] = splits;
    counter_add(split_counter(cta, first), kStarted);
  }
}

// kPerWarp: column chunks that a warp adds up at once. Written to be short: nobody has run this code when a CTA comes to it.
template <class T, int kPerWarp, class Cta>
__device__ __forceinline__ void merge_rows(const Cta& cta, const SplitSequences& own, int which, int row_jobs, float4* scratch, int barrier) {
  const auto& p = cta.p;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int seq = own.seq[which], splits = own.splits[which], rows = min(Cta::kTileRows, p.rows - cta.row0());
  // Few splits: a warp per row. Many: all warps share a row, warp w adding up splits w, w + 8, ..., and their sums are added in the order of the warps.
  const bool share = splits > kMergeWarps;
  const int start = share ? warp : 0, stride = share ? kMergeWarps : 1;
  const int64_t step = int64_t(p.h_kv) * p.rows;                           // rows from one split to the next
  constexpr int kColumnJobs = kChunks / kPerWarp, kBatch = 16 / kPerWarp;  // splits that are on their way at once
#pragma unroll 1
  for (int job = own.order[which]; job < row_jobs * kColumnJobs; job += own.helpers[which]) {
    const int chunk0 = job % kColumnJobs * kPerWarp, row = job / kColumnJobs * (share ? 1 : kMergeWarps) + (share ? 0 : warp);
    if (row >= rows) continue;  // never where warps share
    const int64_t at = (int64_t(own.first_slot[which]) * p.h_kv + cta.kv_head()) * p.rows + cta.row0() + row;
    const float* lse_of = p.partial_lse + at;
    const auto* next = reinterpret_cast<const float4*>(p.partial_out + (at + start * step) * kDv) + chunk0 * (kChunk / 4) + lane;
    float lse = 0.f;
    float4 acc[kPerWarp] = {};
    auto add = [&](float4& a, float w, const float4& v) { a.x = fmaf(w, v.x, a.x), a.y = fmaf(w, v.y, a.y), a.z = fmaf(w, v.z, a.z), a.w = fmaf(w, v.w, a.w); };
#pragma unroll 1
    for (int s0 = start; s0 < splits; s0 += kBatch * stride) {
      float4 batch[kBatch][kPerWarp];
      float weight[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k, next += stride * step * (kDv / 4)) {
        const bool there = s0 + k * stride < splits;
        weight[k] = there ? lse_of[(s0 + k * stride) * step] : -INFINITY;
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c) batch[k][c] = there ? next[c * (kChunk / 4)] : float4{};
      }
      if (s0 == start) {  // behind the loads
        float top = -INFINITY, sum = 0.f;
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) top = fmaxf(top, lse_of[s * step]);
        for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) {
          const float l = lse_of[s * step];
          sum += l == -INFINITY ? 0.f : exp2_fast(l - top);
        }
        for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        lse = sum == 0.f ? -INFINITY : top + log2f(sum);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        weight[k] = weight[k] == -INFINITY ? 0.f : exp2_fast(weight[k] - lse);  // an empty split wrote zeros
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c) add(acc[c], weight[k], batch[k][c]);
      }
    }
    if (share) {
#pragma unroll
      for (int c = 0; c < kPerWarp; ++c) scratch[(warp * kPerWarp + c) * 32 + lane] = acc[c];
      named_sync(barrier, kMergeThreads);
      if (warp == 0) {
#pragma unroll 1
        for (int w = 1; w < kMergeWarps; ++w)
#pragma unroll
          for (int c = 0; c < kPerWarp; ++c) add(acc[c], 1.f, scratch[(w * kPerWarp + c) * 32 + lane]);
      }
      named_sync(barrier, kMergeThreads);
      if (warp != 0) continue;
    }
    const int index = cta.index_of(row), token = cta.token_of(row), head = index - token * p.h_q;
    auto* out = reinterpret_cast<uint2*>(static_cast<T*>(p.out) + (cta.first_index(seq) + index) * kDv) + chunk0 * (kChunk / 4) + lane;
#pragma unroll
    for (int c = 0; c < kPerWarp; ++c) out[c * (kChunk / 4)] = make_uint2(pack<T>(acc[c].x, acc[c].y), pack<T>(acc[c].z, acc[c].w));
    if (chunk0 == 0 && lane == 0) p.lse[(int64_t(seq) * p.h_q + head) * p.s_q + token] = lse * kLn2;
  }
}

// All kMergeThreads, when the CTA's partial results are written. `scratch`: kMergeScratch bytes of shared memory.
template <class T, class Cta>
__device__ __forceinline__ void merge_splits(const Cta& cta, SplitSequences& own, void* scratch, int barrier) {
  if (own.splits[0] + own.splits[1] == 0) return;
  // On its way while the slower warps write.
  const uint64_t seen = threadIdx.x < 2 && own.splits[threadIdx.x] > 0 ? counter_load(split_counter(cta, own.first_slot[threadIdx.x])) : 0;
  named_sync(barrier, kMergeThreads);
  if (threadIdx.x < 2) {
    const int i = threadIdx.x, splits = own.splits[i];
    if (splits > 0) {
      uint64_t& counter = split_counter(cta, own.first_slot[i]);
      const bool may_wait = count_of(seen, kStarted) == splits;
      const uint64_t before = counter_arrive(counter, kArrived + (may_wait ? kHelper : 0));
      if (may_wait) {
        uint64_t now;
        while (count_of(now = counter_wait(counter), kArrived) < splits) {
        }
        own.order[i] = count_of(before, kHelper), own.helpers[i] = count_of(now, kHelper);
      } else if (count_of(before, kArrived) + 1 == splits && count_of(before, kHelper) == 0) {
        own.order[i] = 0, own.helpers[i] = 1;
      }
    }
  }
  named_sync(barrier, kMergeThreads);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (own.helpers[i] == 0) continue;
    // As few and as wide jobs as keep all helpers busy.
    const int rows = min(Cta::kTileRows, cta.p.rows - cta.row0()), row_jobs = own.splits[i] > kMergeWarps ? rows : (rows + kMergeWarps - 1) / kMergeWarps;
    if (row_jobs >= own.helpers[i])
      merge_rows<T, kChunks>(cta, own, i, row_jobs, static_cast<float4*>(scratch), barrier);
    else
      merge_rows<T, 1>(cta, own, i, row_jobs, static_cast<float4*>(scratch), barrier);
  }
}

}  // namespace jax_flashmla
