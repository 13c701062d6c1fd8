// Dense MLA decode for up to 32 query rows per sequence and KV head (tensor-parallel heads), sm_90a. The operands change places: tokens and output columns
// lie on the 64 rows of a product and the queries on its N = 16 or 32 columns, so that nothing is padded to 64 rows.
//
//   S^T [64 tokens, N] = K.Q^T        K in shared memory as it came, Q^T the same
//   O^T [512, N]      += V^T.P^T      V^T is K read M-major; P^T goes through shared memory
//
// A product here is bound by shared memory, not by the tensor cores: about 1400 clocks a block for N = 16, half of what a padded tile takes. The output is
// 4N registers a thread, so each of two warpgroups owns a whole output and every second block; they meet only at the end of a piece.
//
//   warpgroups 0, 1   blocks 0, 2, ... and 1, 3, ...: scores, softmax, P to shared memory, product
//   warpgroup 2       one producer thread: the sub-tiles of all blocks, in order, through one ring
//
// Shared memory: a ring of 64x64 sub-tiles (24 for N = 16: 2.7 blocks), Q, P twice per warpgroup. At the end of a piece the ring also carries what the
// warpgroups tell each other: the producer leaves room for it and announces the room like data.
#pragma once

#include <cmath>
#include <utility>

#include "attention/softmax.cuh"
#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "kernels/dense_decode.h"
#include "kernels/dense_decode_work.cuh"
#include "splitkv/merge.cuh"

namespace jax_flashmla::dense_decode_few_rows {

using dense_decode::Cta, dense_decode::Pages, dense_decode::Work;

template <class T_, int kDqk, int kRows_>
struct Traits {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr bool kRope = kDqk > kDv;
  static constexpr int kSubTiles = kDqk / 64, kVTiles = kDv / 64;
  static constexpr int kRowBytes = kRows * 128;  // of Q or P: kRows rows of 64 columns
  static constexpr int kMergeTiles = kRows / 4;  // half of an output from each warpgroup, in float32
  static constexpr int kRing = kRows == 16 ? 24 : 21;
};

constexpr int kThreads = 384, kComputeThreads = 256, kWarpgroup = 128;
constexpr int kStartThreads = kComputeThreads + 32;  // of the last warpgroup one warp starts; it is a whole one so that its registers can be given away
enum NamedBarrier { kStart = 1, kMerge, kWarpgroup0, kWarpgroup1 };

template <class Tr>
struct alignas(1024) Storage {
  using Rows = typename Tr::T[Tr::kRows * 64];
  typename Tr::T ring[Tr::kRing][64 * 64];
  Rows q[Tr::kSubTiles];
  Rows p[2][2];                                               // [warpgroup][parity of its block]
  float top[2][4][Tr::kRows];                                 // [warpgroup][warp] maxima of a block, where the reference must move
  float reference[2][2][Tr::kRows], sum[2][2][4][Tr::kRows];  // [parity of the piece][warpgroup]
  uint32_t valid_groups[Tr::kRing];                           // of the block whose first sub-tile is here; bit g: the page of tokens 16g .. 16g+15 exists
  Part part;
  Work work;  // the piece whose Q is in shared memory
  SplitSequences splits;
  Barrier full[Tr::kRing], empty[Tr::kRing], q_full, q_empty;
};
static_assert(sizeof(Storage<Traits<__half, 576, 16>>) <= 232448 && sizeof(Storage<Traits<__half, 576, 32>>) <= 232448, "the shared memory of an sm_90 CTA");

// Where sub-tile number `index` of the CTA lies in the ring, and the parity of its full barrier.
template <class Tr>
struct RingPosition {
  int slot;
  uint32_t phase;
  __device__ explicit RingPosition(uint32_t index) : slot(index % Tr::kRing), phase(index / Tr::kRing & 1) {}
  __device__ void next() {
    if (++slot == Tr::kRing) slot = 0, phase ^= 1;
  }
};

// The sub-tiles of a block come with the rope columns first: they are let go of first.
template <class Tr>
__device__ __forceinline__ int column_tile(int i) {
  return !Tr::kRope ? i : i == 0 ? Tr::kVTiles : i - 1;
}

// ---- producer -----------------------------------------------------------------------------------------------------------------------------------

template <class Tr>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const CUtensorMap& k_map, const DenseDecodeParams& p, Storage<Tr>& smem, int lane) {
  const int tokens = min(p.page_size, kBlockTokens);  // a copy stays within a page
  if (lane < Tr::kRing) barrier_init(smem.full[lane], 1), barrier_init(smem.empty[lane], 4);
  if (lane == 0) {
    barrier_init(smem.q_full, 1);
    barrier_init(smem.q_empty, 8);
    tma_prefetch_map(q_map);
    tma_prefetch_map(k_map);
  }
  barrier_init_fence();
  wait_for_predecessor();
  const Part part = dense_decode::load_part(p);
  const Cta<Tr::kRows> cta{p, part};
  if (lane == 0) smem.part = part;
  __syncwarp();
  named_arrive(kStart, kStartThreads);
  if (lane != 0) return;

  RingPosition<Tr> at(0);
  uint32_t q_phase = 1;
  for (int seq = part.begin_seq; seq <= cta.last_seq(); ++seq) {
    const Work w = cta.work(seq);
    Pages pages = load_pages(p, w, w.begin, tokens);
    barrier_wait(smem.q_empty, q_phase);
    q_phase ^= 1;
    smem.work = w;  // published by the barrier
    barrier_expect(smem.q_full, Tr::kSubTiles * Tr::kRowBytes);
#pragma unroll 1
    for (int t = 0; t < Tr::kSubTiles; ++t) load_q(q_map, smem.q_full, smem.q[t], cta, seq, t);

    for (int block = w.begin; block < w.end; ++block) {
#pragma unroll 1
      for (int i = 0; i < Tr::kSubTiles; ++i, at.next()) {
        barrier_wait(smem.empty[at.slot], at.phase ^ 1);
        if (i == 0) smem.valid_groups[at.slot] = pages.valid_groups;  // published by the barrier below
        barrier_expect(smem.full[at.slot], kSubTileBytes);
        load_k(k_map, smem.full[at.slot], smem.ring[at.slot], cta, pages, block, tokens, column_tile<Tr>(i));
      }
      if (block + 1 < w.end) pages = load_pages(p, w, block + 1, tokens);
    }
    // Room for the merge.
    for (int i = 0; i < Tr::kMergeTiles; ++i, at.next()) {
      barrier_wait(smem.empty[at.slot], at.phase ^ 1);
      barrier_arrive(smem.full[at.slot]);
    }
  }
}

// ---- compute warpgroups -------------------------------------------------------------------------------------------------------------------------
//
// Accumulators (64 x kRows): warp w, lane l holds rows 16w + l/4 + 8r and columns 8i + 2(l%4) + e as x[4i + 2r + e]. A row is a token or an output column;
// a column is a query row, "its" column c = 2i + e of a thread.

template <class Tr>
using Accumulator = float[Tr::kRows / 2];
template <class Tr>
using Columns = float[Tr::kRows / 4];

// Transposes a packed accumulator into kRows rows of 64 elements with 128-byte swizzle: this warp's 16 rows become 16 columns.
template <class Tr>
__device__ __forceinline__ void store_transposed(void* tile, int warp, int lane, const uint32_t (&v)[Tr::kRows / 4]) {
#pragma unroll
  for (int k = 0; k < Tr::kRows / 16; ++k) {
    const int row = 16 * k + 8 * (lane >> 4) + (lane & 7), chunk = 2 * warp + (lane >> 3 & 1);
    store_matrices_transposed(smem_address(tile) + row * 128 + ((chunk ^ (row & 7)) << 4), v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]);
  }
}

// Scores become probabilities in P; sum[c] is this thread's share of the block.
template <class Tr>
__device__ __forceinline__ void probabilities(const Accumulator<Tr>& s, float scale_log2, const Columns<Tr>& reference, Columns<Tr>& sum, void* p, int warp,
                                              int lane) {
  uint32_t words[Tr::kRows / 4];
#pragma unroll
  for (int i = 0; i < Tr::kRows / 8; ++i) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = reference[2 * i + e] == -INFINITY ? 0.f : reference[2 * i + e];
#pragma unroll
      for (int r = 0; r < 2; ++r) x[2 * r + e] = exp2_fast(fmaf(s[4 * i + 2 * r + e], scale_log2, -shift));
      sum[2 * i + e] = x[e] + x[2 + e];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) words[2 * i + r] = pack<typename Tr::T>(x[2 * r], x[2 * r + 1]);
  }
  store_transposed<Tr>(p, warp, lane, words);
}

// Over the eight lanes (and sixteen tokens) of a warp that hold the same columns.
template <class Op>
__device__ __forceinline__ float reduce_rows(float x, Op op) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) x = op(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

template <class Tr, int kWg>
__device__ __forceinline__ void compute(const DenseDecodeParams& p, Storage<Tr>& smem, int warp, int lane) {
  using T = typename Tr::T;
  using A = TransposedAtoms<T, Tr::kRows>;
  constexpr int kColumns = Tr::kRows / 4;
  wait_for_predecessor();
  named_sync(kStart, kStartThreads);  // the barriers are initialised, the part is there
  const Cta<Tr::kRows> cta{p, smem.part};
  if (threadIdx.x == kComputeThreads - 1) announce_splits(cta, smem.splits);
  // A scale of zero (a plain mean) would turn the masked -inf into NaN; this is as good as zero.
  const float scale_log2 = fmaxf(p.softmax_scale, 1e-30f) * kLog2E;
  auto column_of = [&](int c) { return 8 * (c / 2) + 2 * (lane & 3) + (c & 1); };
  auto warpgroup_sync = [&] { named_sync(kWarpgroup0 + kWg, kWarpgroup); };
  auto arrive = [&](Barrier& bar) {
    __syncwarp();  // an arrival releases the arriving thread's accesses only
    if (lane == 0) barrier_arrive(bar);
  };

  float o[Tr::kVTiles][Tr::kRows / 2];
  Columns<Tr> reference, sum;
  uint32_t q_phase = 0, parity = 0, tiles = 0;  // sub-tiles before this piece

  for (int seq = cta.part.begin_seq; seq <= cta.last_seq(); ++seq) {
    barrier_wait(smem.q_full, q_phase);
    q_phase ^= 1;
    const Work w = smem.work;
    const int all_see = cta.keys_of(w.len, 0);  // tokens before this one are seen by every row
#pragma unroll
    for (int c = 0; c < kColumns; ++c) reference[c] = -INFINITY, sum[c] = 0.f;

    if (w.begin + kWg >= w.end) {  // no block: the registers still hold the last piece's
      arrive(smem.q_empty);
#pragma unroll
      for (int t = 0; t < Tr::kVTiles; ++t)
#pragma unroll
        for (int i = 0; i < Tr::kRows / 2; ++i) o[t][i] = 0.f;
    }
    for (int block = w.begin + kWg; block < w.end; block += 2, parity ^= 1) {
      const RingPosition<Tr> first(tiles + (block - w.begin) * Tr::kSubTiles);
      Accumulator<Tr> s;
      pin(s);
      wgmma_fence();
      RingPosition<Tr> at = first;
#pragma unroll
      for (int i = 0; i < Tr::kSubTiles; ++i, at.next()) {
        barrier_wait(smem.full[at.slot], at.phase);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
          mma<typename A::Scores>(s, smem_desc(smem.ring[at.slot]) + 2 * step, smem_desc(smem.q[column_tile<Tr>(i)]) + 2 * step, i + step > 0);
      }
      wgmma_commit();
      const uint32_t valid_groups = smem.valid_groups[first.slot];
      wgmma_wait<0>();
      pin(s);
      if (Tr::kRope) arrive(smem.empty[first.slot]);
      if (block + 2 >= w.end) arrive(smem.q_empty);

      const int token0 = block * kBlockTokens;
      if (token0 + kBlockTokens > all_see || valid_groups != 0xF) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int limit = cta.keys_of(w.len, cta.token_of(column_of(c)));
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (!(valid_groups >> warp & 1) || token0 + 16 * warp + lane / 4 + 8 * r >= limit) s[4 * (c / 2) + 2 * r + (c & 1)] = -INFINITY;
        }
        // Slots past the end of the sequence may hold anything, and 0 x NaN is NaN: clears their rows of V.
        const int tail = w.len - token0;
        if (tail < kBlockTokens) {
          warpgroup_sync();  // every warp's scores are through with the keys
          RingPosition<Tr> v = first;
          if (Tr::kRope) v.next();
          for (int t = 0; t < Tr::kVTiles; ++t, v.next())
            for (int i = threadIdx.x % kWarpgroup; i < (64 - tail) * 8; i += kWarpgroup)
              reinterpret_cast<uint4*>(smem.ring[v.slot])[tail * 8 + i] = make_uint4(0, 0, 0, 0);
        }
      }

      // Probabilities against the reference as it is. Where a score outgrew it, all of the warpgroup raises the reference and does the block again.
      Columns<Tr> top, block_sum;
      bool outgrown = false;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        top[c] = fmaxf(s[4 * (c / 2) + (c & 1)], s[4 * (c / 2) + 2 + (c & 1)]);
        outgrown |= fmaf(top[c], scale_log2, -reference[c]) > kReferenceSlack;  // false for -inf - -inf
      }
      void* probs = smem.p[kWg][parity];
      probabilities<Tr>(s, scale_log2, reference, block_sum, probs, warp, lane);
      fence_async_proxy();
      if (named_or(kWarpgroup0 + kWg, kWarpgroup, outgrown)) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          top[c] = reduce_rows(top[c], [](float a, float b) { return fmaxf(a, b); });
          if (lane < 4) smem.top[kWg][warp][column_of(c)] = top[c];
        }
        warpgroup_sync();
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float (&tops)[4][Tr::kRows] = smem.top[kWg];
          const int n = column_of(c);
          const float highest = fmaxf(fmaxf(tops[0][n], tops[1][n]), fmaxf(tops[2][n], tops[3][n])) * scale_log2;
          const bool grew = highest - reference[c] > kReferenceSlack;
          const float factor = grew ? exp2_fast(reference[c] - highest) : 1.f;
          if (grew) reference[c] = highest;
          sum[c] *= factor;
#pragma unroll
          for (int t = 0; t < Tr::kVTiles; ++t)
#pragma unroll
            for (int r = 0; r < 2; ++r) o[t][4 * (c / 2) + 2 * r + (c & 1)] *= factor;
        }
        probabilities<Tr>(s, scale_log2, reference, block_sum, probs, warp, lane);
        fence_async_proxy();
        warpgroup_sync();
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += block_sum[c];

      at = first;
      if (Tr::kRope) at.next();
      const RingPosition<Tr> first_v = at;
#pragma unroll
      for (int t = 0; t < Tr::kVTiles; ++t) pin(o[t]);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < Tr::kVTiles; ++t, at.next())
#pragma unroll
        for (int step = 0; step < 4; ++step)
          mma<typename A::Output>(o[t], smem_desc(smem.ring[at.slot]) + 128 * step, smem_desc(probs) + 2 * step, block > w.begin + kWg || step > 0);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < Tr::kVTiles; ++t) pin(o[t]);
      __syncwarp();
      if (lane < Tr::kVTiles) barrier_arrive(smem.empty[(first_v.slot + lane) % Tr::kRing]);
    }
    tiles += (w.end - min(w.begin, w.end)) * Tr::kSubTiles;

    // The merge: each warpgroup keeps one half of the columns and hands the other half over, unscaled, with its reference and sums.
    constexpr int kOwn = kWg * Tr::kVTiles / 2, kOther = (1 - kWg) * Tr::kVTiles / 2;
    constexpr int kTheirTiles = Tr::kMergeTiles / 2;  // of 16 registers of 128 threads
    const int thread = threadIdx.x % kWarpgroup;
    auto stage = [&](int from, int k) -> float& {  // register k of warpgroup `from`
      const RingPosition<Tr> at(tiles + from * kTheirTiles + k / 16);
      return reinterpret_cast<float*>(smem.ring[at.slot])[k % 16 * kWarpgroup + thread];
    };
    auto& references = smem.reference[q_phase];
    auto& sums = smem.sum[q_phase];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = reduce_rows(sum[c], [](float a, float b) { return a + b; });
      if (lane < 4) sums[kWg][warp][column_of(c)] = sum[c];
      if (lane < 4 && warp == 0) references[kWg][column_of(c)] = reference[c];
    }
#pragma unroll
    for (int i = 0; i < kTheirTiles; ++i) {
      const RingPosition<Tr> at(tiles + kWg * kTheirTiles + i);
      barrier_wait(smem.full[at.slot], at.phase);
    }
#pragma unroll
    for (int k = 0; k < 2 * Tr::kRows; ++k) stage(kWg, k) = o[kOther + k / (Tr::kRows / 2)][k % (Tr::kRows / 2)];
    fence_async_proxy();
    if (seq == cta.last_seq()) let_successor_start();
    named_sync(kMerge, kComputeThreads);

    Columns<Tr> ours, theirs;  // what either's output is multiplied by
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int n = column_of(c);
      float other_sum = 0.f, own_sum = 0.f;
#pragma unroll
      for (int v = 0; v < 4; ++v) own_sum += sums[kWg][v][n], other_sum += sums[1 - kWg][v][n];
      const float other = references[1 - kWg][n], highest = fmaxf(reference[c], other);
      const float own_factor = rescale_factor(reference[c], highest), other_factor = rescale_factor(other, highest);
      // In the order of the warpgroups, so that both come to the same bits.
      const float total = kWg == 0 ? own_factor * own_sum + other_factor * other_sum : other_factor * other_sum + own_factor * own_sum;
      const bool any = total != 0.f;  // a row without a key: output 0, lse -inf; NaN goes through
      const float inverse = any ? 1.f / total : 0.f, lse2 = any ? highest + log2f(total) : -INFINITY;
      ours[c] = own_factor * inverse, theirs[c] = other_factor * inverse;
      const int index = cta.index_of(n);
      if (kWg == 0 && warp == 0 && lane < 4 && index >= 0) {
        const int token = cta.token_of(n), head = index - token * p.h_q;
        if (w.slot < 0)
          p.lse[(int64_t(seq) * p.h_q + head) * p.s_q + token] = lse2 * kLn2;
        else if (w.slot < p.slots)
          p.partial_lse[(int64_t(w.slot) * p.h_kv + cta.kv_head()) * p.rows + n] = lse2;
      }
    }
#pragma unroll
    for (int k = 0; k < 2 * Tr::kRows; ++k) {
      float& x = o[kOwn + k / (Tr::kRows / 2)][k % (Tr::kRows / 2)];
      const int i = k % (Tr::kRows / 2), c = 2 * (i / 4) + (i & 1);
      x = x * ours[c] + stage(1 - kWg, k) * theirs[c];
    }
    __syncwarp();
    if (lane < kTheirTiles) barrier_arrive(smem.empty[RingPosition<Tr>(tiles + (1 - kWg) * kTheirTiles + lane).slot]);
    tiles += Tr::kMergeTiles;

    // P is free: both warpgroups are through with their last products.
    if (w.slot < 0) {
      T* out = static_cast<T*>(p.out) + cta.first_index(seq) * kDv + kWg * (kDv / 2);
#pragma unroll
      for (int t = 0; t < Tr::kVTiles / 2; ++t) {
        const auto& x = o[kOwn + t];
        uint32_t words[Tr::kRows / 4];
#pragma unroll
        for (int i = 0; i < Tr::kRows / 4; ++i) words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
        char* tile = reinterpret_cast<char*>(smem.p[kWg][t & 1]);
        store_transposed<Tr>(tile, warp, lane, words);
        warpgroup_sync();
#pragma unroll
        for (int i = 0; i < Tr::kRows / 16; ++i) {
          const int row = 16 * i + thread / 8, chunk = thread & 7, index = cta.index_of(row);
          if (index >= 0)
            *reinterpret_cast<uint4*>(out + int64_t(index) * kDv + t * 64 + chunk * 8) =
                *reinterpret_cast<uint4*>(tile + row * 128 + ((chunk ^ (row & 7)) << 4));
        }
      }
      warpgroup_sync();  // the next piece's probabilities go to the same place
    } else if (w.slot < p.slots) {
      // Eight lanes write a 32-byte sector.
      float* out = p.partial_out + (int64_t(w.slot) * p.h_kv + cta.kv_head()) * p.rows * kDv + kWg * (kDv / 2) + 16 * warp + lane / 4;
#pragma unroll
      for (int k = 0; k < 2 * Tr::kRows; ++k) {
        const int t = k / (Tr::kRows / 2), i = k % (Tr::kRows / 2), n = column_of(2 * (i / 4) + (i & 1));
        if (n < p.rows) out[int64_t(n) * kDv + 64 * t + 8 * (i >> 1 & 1)] = o[kOwn + t][i];
      }
    }
  }
}

// ---- kernel and launcher ------------------------------------------------------------------------------------------------------------------------

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_few_rows_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                 const __grid_constant__ DenseDecodeParams p) {
  extern __shared__ char raw[];
  auto& smem = *reinterpret_cast<Storage<Tr>*>(raw);
  // Broadcast, so that the compiler sees warp-uniform branches.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    if (warp == 8) produce<Tr>(q_map, k_map, p, smem, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<224>();
    if (warp < 4)
      compute<Tr, 0>(p, smem, warp, lane);
    else
      compute<Tr, 1>(p, smem, warp - 4, lane);
    const Cta<Tr::kRows> cta{p, smem.part};
    static_assert(kMergeThreads == kComputeThreads && kMergeScratch <= sizeof(smem.ring));
    if (cta.part.begin_seq <= cta.last_seq()) merge_splits<typename Tr::T>(cta, smem.splits, smem.ring, kMerge);
  }
}

template <class T, int kDqk, int kRows>
Status launch_rows(const DenseDecodeParams& p) {
  using Tr = Traits<T, kDqk, kRows>;
  CUtensorMap q_map, k_map;
  if (Status error = dense_decode::encode_maps<T>(q_map, k_map, p, kRows)) return error;
  const auto kernel = dense_decode_few_rows_kernel<Tr>;
  constexpr size_t smem = sizeof(Storage<Tr>);
  if (cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem)) return cudaGetErrorString(err);
  if (cudaError_t err = launch(kernel, dim3(1, p.h_kv, p.num_parts), kThreads, smem, p.stream, q_map, k_map, p)) return cudaGetErrorString(err);
  return nullptr;
}

template <class T, int kDqk>
Status launch_dense_decode_few_rows(const DenseDecodeParams& p) {
  return p.rows <= 16 ? launch_rows<T, kDqk, 16>(p) : launch_rows<T, kDqk, 32>(p);
}

}  // namespace jax_flashmla::dense_decode_few_rows
