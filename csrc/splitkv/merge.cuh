// Merges, inside the decode kernel, the partial results of the sequences that the schedule split:
//
//   out = sum_s w_s O_s / sum_s w_s l_s,   w_s = 2^(m_s - max m),      in float32 and in a fixed order
//
// where split s wrote its output O_s as it was accumulated, against the reference maximum m_s, and its row sums l_s.
//
// A CTA that is through with all of its pieces arrives at a counter for each split sequence that it had a piece of. The merge is done by those that found
// every piece of the sequence already started: they wait for the rest to arrive and share the work. A CTA therefore waits only for CTAs that run, and none
// of those waits before it has arrived: nobody depends on who is resident. Where nobody could wait, the last to arrive merges alone. How many help
// decides who adds up what, never in which order.
//
// Everything here runs once per CTA, so it is short before it is anything else: code that is not in the instruction cache is what costs.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/softmax.cuh"
#include "hopper/barrier.cuh"
#include "hopper/counter.cuh"
#include "params.h"

namespace jax_flashmla {

// Output O_s lies in memory as a warp holds it: a fragment is 16 rows x 8 columns, lane l has rows l/4 and + 8, columns 2(l%4) and + 1 as one float4. The
// fragments of 16 rows are 512 columns in order; one warpgroup's warp writes half of them.
inline constexpr int kFragmentRows = 16, kRowFragments = kDv / 8, kFragmentLanes = 32;

template <class Cta>
__device__ __forceinline__ float4* partial_fragments(const Cta& cta, int slot, int tile_row) {
  const auto& p = cta.p;
  const int64_t groups = (p.rows + kFragmentRows - 1) / kFragmentRows, group = (cta.row0() + tile_row) / kFragmentRows;
  return reinterpret_cast<float4*>(p.partial_out) + ((int64_t(slot) * p.h_kv + cta.kv_head()) * groups + group) * (kRowFragments * kFragmentLanes);
}
template <class Cta>
__device__ __forceinline__ float2* partial_stats(const Cta& cta, int slot) {  // of the rows of the tile: m_s and l_s
  return reinterpret_cast<float2*>(cta.p.partial_stats) + (int64_t(slot) * cta.p.h_kv + cta.kv_head()) * cta.p.rows + cta.row0();
}

// A counter holds three numbers of CTAs. A part has at most two split sequences: the one it begins in and the one it ends in.
inline constexpr uint64_t kHelper = 1, kArrived = 1ull << 21, kStarted = 1ull << 42;
__device__ __forceinline__ int count_of(uint64_t counter, uint64_t unit) { return int(counter / unit & (kArrived - 1)); }

// Where a row of the tile lies among those of its sequence: in q and out, -1 for a row past the end, and in lse.
struct RowPlace {
  int index, lse_index;
};

// In shared memory.
struct SplitSequences {
  int seq[2], first_slot[2], splits[2];  // splits = 0: there is none, or it is not split
  int order[2], helpers[2];              // this CTA is number `order` of `helpers`; 0: others merge
};

constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * 32;
constexpr int kMaxSplits = 192;  // of a sequence; a plan has one part per SM and tile, and more splits than that are made up

// In shared memory too, while a sequence is merged.
struct MergeScratch {
  float weight[kMaxSplits * kRowTile], l[kMaxSplits * kRowTile];  // of a split and row; weight is m at first
  float top[kMergeThreads], sum[kMergeThreads];                   // of a share of the splits and a row
  float4 shared[kMergeWarps][32];
};

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
    if (splits <= 0 || splits > kMaxSplits || first < 0 || splits > cta.p.slots - first) continue;  // not split, or a made-up plan
    own.seq[i] = seq, own.first_slot[i] = first, own.splits[i] = splits;
    counter_add(split_counter(cta, first), kStarted);
  }
}

// Weights of all splits for 2^row_bits rows; several threads share a row, each with its share of the splits.
template <class Cta>
__device__ __forceinline__ void merge_weights(const Cta& cta, int first_slot, int splits, int row_bits, MergeScratch& scratch, int barrier) {
  constexpr int kBatch = 8;
  const int rows = 1 << row_bits, shares = kMergeThreads >> row_bits, share = threadIdx.x >> row_bits, row = threadIdx.x & (rows - 1);
  const bool there = cta.row0() + row < cta.p.rows;
  const int64_t step = int64_t(cta.p.h_kv) * cta.p.rows;
  const float2* next = partial_stats(cta, first_slot) + row + share * step;
  float top = -INFINITY, sum = 0.f;
#pragma unroll 1
  for (int s0 = share; s0 < splits; s0 += kBatch * shares) {
    float2 m_l[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, next += shares * step) m_l[i] = there && s0 + i * shares < splits ? *next : float2{-INFINITY, 0.f};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = (s0 + i * shares << row_bits) + row;
      if (s0 + i * shares < splits) scratch.weight[at] = m_l[i].x, scratch.l[at] = m_l[i].y;
      top = fmaxf(top, m_l[i].x);
    }
  }
  scratch.top[threadIdx.x] = top;
  named_sync(barrier, kMergeThreads);
#pragma unroll 4
  for (int i = 0; i < shares; ++i) top = fmaxf(top, scratch.top[(i << row_bits) + row]);
#pragma unroll 2
  for (int at = threadIdx.x; at < splits << row_bits; at += kMergeThreads) {
    // A split in which the row has no key has m = -inf and l = 0; with NaN among its scores m = -inf and l = NaN.
    const float m = scratch.weight[at], l = scratch.l[at], weight = m == -INFINITY ? (l == 0.f ? 0.f : 1.f) : exp2_fast(m - top);
    scratch.weight[at] = weight;
    sum = fmaf(weight, l, sum);
  }
  scratch.sum[threadIdx.x] = sum;
  named_sync(barrier, kMergeThreads);
}

// This CTA's share of one sequence. Divided by the plan alone, so that the sums are always the same; helpers == splits when all help.
template <class T, class Cta>
__device__ __forceinline__ void merge_sequence(const Cta& cta, const RowPlace* places, int seq, int first_slot, int splits, int order, int helpers,
                                               MergeScratch& scratch, int barrier) {
  const auto& p = cta.p;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int rows = min(kRowTile, p.rows - cta.row0()), fragments = (rows + kFragmentRows - 1) / kFragmentRows * kRowFragments;
  const int row_bits = rows > 32 ? 6 : rows > 16 ? 5 : 4;
  // A warp has sixteen loads on their way: four fragments of up to four splits, or one fragment of sixteen, which several warps may share.
  const bool wide = splits <= 4;
  int sharers = 1;
  while (!wide && sharers < kMergeWarps && 2 * sharers * fragments <= kMergeWarps * splits) sharers *= 2;
  const int teams = kMergeWarps / sharers, units = wide ? fragments / 4 : fragments, sharer = warp % sharers;
  const int64_t split_step = partial_fragments(cta, first_slot + 1, 0) - partial_fragments(cta, first_slot, 0), inner = sharers * split_step;
  const int64_t outer = wide ? kFragmentLanes : 4 * inner;
  const int inner_splits = sharers, outer_splits = wide ? 0 : 4 * sharers;
  auto top_of = [&](int tile_row) {
    float top = -INFINITY;
    for (int i = tile_row; i < kMergeThreads; i += 1 << row_bits) top = fmaxf(top, scratch.top[i]);
    return top;
  };
  bool weighted = false;
  int unit0 = order * teams;
#pragma unroll 1
  do {
    const int unit = unit0 + warp / sharers, fragment = wide ? 4 * unit : unit, end = unit < units ? splits : 0;
    const int row = fragment / kRowFragments * kFragmentRows + lane / 4;
    const float4* next = partial_fragments(cta, first_slot, 0) + int64_t(fragment) * kFragmentLanes + lane + sharer * split_step;
    float4 sum[4] = {};
    int s0 = sharer;
#pragma unroll 1
    do {
      float4 batch[4][4];
#pragma unroll
      for (int a = 0; a < 4; ++a, next += outer) {
        const float4* from = next;
#pragma unroll
        for (int b = 0; b < 4; ++b, from += inner) batch[a][b] = s0 + a * outer_splits + b * inner_splits < end ? *from : float4{};
      }
      if (!weighted) merge_weights(cta, first_slot, splits, row_bits, scratch, barrier);  // while they are on their way
      weighted = true;
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float* weight = scratch.weight + (min(s0 + a * outer_splits + b * inner_splits, splits - 1) << row_bits) + row;  // past the end times zero
          const float4& v = batch[a][b];
          sum[a].x = fmaf(weight[0], v.x, sum[a].x), sum[a].y = fmaf(weight[0], v.y, sum[a].y);
          sum[a].z = fmaf(weight[8], v.z, sum[a].z), sum[a].w = fmaf(weight[8], v.w, sum[a].w);
        }
      s0 += 16 * sharers;
    } while (s0 < end);

    auto add = [](float4& a, const float4& b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; };
    if (!wide) add(sum[0], sum[1]), add(sum[2], sum[3]), add(sum[0], sum[2]);
    if (sharers > 1) {
      scratch.shared[warp][lane] = sum[0];
      named_sync(barrier, kMergeThreads);
      if (sharer == 0) {
#pragma unroll 1
        for (int i = 1; i < sharers; ++i) add(sum[0], scratch.shared[warp + i][lane]);
      }
      named_sync(barrier, kMergeThreads);
    }
    if (end > 0 && sharer == 0) {
      const int column = fragment % kRowFragments * 8 + 2 * (lane & 3);
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        const int tile_row = row + 8 * r;
        const RowPlace place = places[tile_row];
        float total = 0.f;
#pragma unroll 4
        for (int i = tile_row; i < kMergeThreads; i += 1 << row_bits) total += scratch.sum[i];
        const float inverse = total != 0.f ? 1.f / total : 0.f;  // a row without a key: output 0, lse -inf; NaN goes through
        if (place.index >= 0) {
          auto* out = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + (cta.first_index(seq) + place.index) * kDv + column);
#pragma unroll
          for (int a = 0; a < 4; ++a)
            if (a == 0 || wide) out[4 * a] = pack<T>((r ? sum[a].z : sum[a].x) * inverse, (r ? sum[a].w : sum[a].y) * inverse);
          if (column == 0) p.lse[cta.first_index(seq) + place.lse_index] = total != 0.f ? (top_of(tile_row) + log2f(total)) * kLn2 : -INFINITY;
        }
      }
    }
  } while ((unit0 += helpers * teams) < units);
  named_sync(barrier, kMergeThreads);  // the scratch is free
}

// All kMergeThreads, when the CTA's partial results are written.
template <class T, class Cta>
__device__ __forceinline__ void merge_splits(const Cta& cta, const RowPlace* places, SplitSequences& own, MergeScratch& scratch, int barrier) {
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
    if (own.helpers[i] > 0) merge_sequence<T>(cta, places, own.seq[i], own.first_slot[i], own.splits[i], own.order[i], own.helpers[i], scratch, barrier);
}

}  // namespace jax_flashmla
