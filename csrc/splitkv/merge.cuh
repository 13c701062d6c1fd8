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
constexpr int kMergeScratch = kMergeThreads * sizeof(float4);

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

// Splits in batches of kBatch, whose partial results are on their way at once: kPerWarp column chunks of one row each. A warp adds up every `stride`-th split
// from `start` on. Written to be short: no CTA has run this code before it comes here.
template <int kPerWarp>
struct MergedRow {
  static constexpr int kBatch = 16 / kPerWarp;
  float lse;
  float4 sum[kPerWarp] = {};

  __device__ __forceinline__ static void add(float4& a, float w, const float4& v) {
    a.x = fmaf(w, v.x, a.x), a.y = fmaf(w, v.y, a.y), a.z = fmaf(w, v.z, a.z), a.w = fmaf(w, v.w, a.w);
  }

  // lse_of: of split 0; step: rows from one split to the next; part_of: of split 0, this lane's column of the first chunk.
  __device__ __forceinline__ MergedRow(const float* lse_of, const float4* part_of, int64_t step, int splits, int start, int stride) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int s0 = start; s0 < splits; s0 += kBatch * stride) {
      const int own = s0 + lane * stride;
      float weight = lane < kBatch && own < splits ? lse_of[own * step] : -INFINITY;
      float4 batch[kBatch][kPerWarp];
      const float4* next = part_of + s0 * step * (kDv / 4);
#pragma unroll
      for (int k = 0; k < kBatch; ++k, next += stride * step * (kDv / 4))
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c) batch[k][c] = s0 + k * stride < splits ? next[c * (kChunk / 4)] : float4{};
      if (s0 == start) set_lse(lse_of, step, splits);                // behind the loads
      weight = weight == -INFINITY ? 0.f : exp2_fast(weight - lse);  // an empty split wrote zeros
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float w = __shfl_sync(~0u, weight, k);
#pragma unroll
        for (int c = 0; c < kPerWarp; ++c) add(sum[c], w, batch[k][c]);
      }
    }
  }

  __device__ __forceinline__ void set_lse(const float* lse_of, int64_t step, int splits) {
    const int lane = threadIdx.x & 31;
    float top = -INFINITY, total = 0.f;
#pragma unroll 1
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, lse_of[s * step]);
#pragma unroll
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll 1
    for (int s = lane; s < splits; s += 32) {
      const float l = lse_of[s * step];
      total += l == -INFINITY ? 0.f : exp2_fast(l - top);
    }
#pragma unroll
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
    lse = total == 0.f ? -INFINITY : top + log2f(total);
  }
};

// This CTA's share of the rows of one sequence.
template <class T, class Cta>
__device__ __forceinline__ void merge_sequence(const Cta& cta, int seq, int first_slot, int splits, int order, int helpers, float4* scratch, int barrier) {
  const auto& p = cta.p;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int rows = min(Cta::kTileRows, p.rows - cta.row0());
  const int64_t step = int64_t(p.h_kv) * p.rows, first = first_slot * step + int64_t(cta.kv_head()) * p.rows + cta.row0();
  auto part_of = [&](int row, int chunk) { return reinterpret_cast<const float4*>(p.partial_out + (first + row) * kDv) + chunk * (kChunk / 4) + lane; };
  auto store = [&](int row, int chunk, const float4* sum, int chunks, float lse) {
    const int index = cta.index_of(row), token = cta.token_of(row), head = index - token * p.h_q;
    auto* out = reinterpret_cast<uint2*>(static_cast<T*>(p.out) + (cta.first_index(seq) + index) * kDv) + chunk * (kChunk / 4) + lane;
#pragma unroll
    for (int c = 0; c < chunks; ++c) out[c * (kChunk / 4)] = make_uint2(pack<T>(sum[c].x, sum[c].y), pack<T>(sum[c].z, sum[c].w));
    if (chunk == 0 && lane == 0) p.lse[(int64_t(seq) * p.h_q + head) * p.s_q + token] = lse * kLn2;
  };
  // How a row is divided depends on the plan alone, so that the sums do; helpers == splits when all help.
  if (rows >= kMergeWarps * splits) {  // enough whole rows for every warp
#pragma unroll 1
    for (int row = order * kMergeWarps + warp; row < rows; row += helpers * kMergeWarps) {
      const MergedRow<kChunks> merged(p.partial_lse + first + row, part_of(row, 0), step, splits, 0, 1);
      store(row, 0, merged.sum, kChunks, merged.lse);
    }
    return;
  }
  // A column chunk of a row for every warp, or for the first of several warps that share its splits.
  int sharers = 1;
  while (sharers < kMergeWarps && rows * sharers <= splits) sharers *= 2;
  const int teams = kMergeWarps / sharers, units = rows * kChunks;
#pragma unroll 1
  for (int unit0 = order * teams; unit0 < units; unit0 += helpers * teams) {
    const int unit = unit0 + warp / sharers, row = unit / kChunks, chunk = unit % kChunks, sharer = warp % sharers;
    const bool any = unit < units;
    MergedRow<1> merged(p.partial_lse + first + row, part_of(row, chunk), step, any ? splits : 0, sharer, sharers);
    if (sharers > 1) {
      scratch[warp * 32 + lane] = merged.sum[0];
      named_sync(barrier, kMergeThreads);
#pragma unroll 1
      for (int w = 1; w < sharers && sharer == 0; ++w) MergedRow<1>::add(merged.sum[0], 1.f, scratch[(warp + w) * 32 + lane]);
      named_sync(barrier, kMergeThreads);
    }
    if (any && sharer == 0) store(row, chunk, merged.sum, 1, merged.lse);
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
  for (int i = 0; i < 2; ++i)
    if (own.helpers[i] > 0)
      merge_sequence<T>(cta, own.seq[i], own.first_slot[i], own.splits[i], own.order[i], own.helpers[i], static_cast<float4*>(scratch), barrier);
}

}  // namespace jax_flashmla
