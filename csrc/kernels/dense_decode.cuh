// Dense MLA decode over a paged latent cache, sm_90a: the seesaw of seesaw.cuh, its K slots filled by TMA.
//
//   warpgroups 0, 1   compute
//   warpgroup 2       four producer threads, one per (K slot, output half): each refills its half as soon as its readers let go. Also load Q.
#pragma once

#include <algorithm>

#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/tma.cuh"
#include "kernels/dense_decode.h"
#include "kernels/seesaw.cuh"

namespace jax_flashmla::dense_decode {

using namespace seesaw;  // NOLINT: this kernel is one of its two halves

// ---- producer threads ---------------------------------------------------------------------------------------------------------------------------

// The pages of a block, one per copy; -1 where there is none: past the length or not in the pool.
struct Pages {
  int id[4];
  uint32_t valid_groups;
};
__device__ __forceinline__ Pages load_pages(const DenseDecodeParams& p, const Work& w, int block, int tokens) {
  Pages pages{{-1, -1, -1, -1}, 0};
  const int page_bits = __ffs(p.page_size) - 1;  // page sizes are powers of two
  const int* table = p.block_table + int64_t(w.seq) * p.max_pages;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int token = block * kBlockTokens + c * tokens, column = token >> page_bits;
    if (c * tokens < kBlockTokens) {
      // Does not wait for the length: an entry past it holds anything, and is not looked at.
      const int page = column < p.max_pages ? table[column] : -1;
      if (token < w.len && static_cast<unsigned>(page) < static_cast<unsigned>(p.num_pages)) pages.id[c] = page;
      if (pages.id[c] >= 0 || token >= w.len) pages.valid_groups |= ((1u << tokens / 16) - 1) << (c * tokens / 16);
    }
  }
  return pages;
}

// kTiles times 64 columns of a block of keys, from columns 64 t on: eight tokens of all behind the eight before. A page of -1 lies outside of the map: zeros
// are written, and count as bytes.
template <int kTiles, class T>
__device__ __forceinline__ void load_k(const CUtensorMap& k_map, Barrier& full, T* dst, const DenseDecodeParams& p, const Pages& pages, int block, int tokens,
                                       int t) {
  barrier_expect(full, kTiles * kSubTileBytes);
  if (tokens == kBlockTokens) {
    tma_load(k_map, full, dst, 0, 0, t, (pages.id[0] * p.page_size + (block * kBlockTokens & (p.page_size - 1))) / 8);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c * tokens < kBlockTokens) tma_load(k_map, full, dst + c * tokens * kTiles * 64, 0, 0, t, pages.id[c] * p.page_size / 8);
  }
}

template <class Tr>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& rope_map, const DenseDecodeParams& p,
                                        Storage<Tr>& smem, int warp, int lane) {
  cutlass::arch::warpgroup_reg_dealloc<Tr::kProducerRegisters>();
  const int slot = warp >> 1, half = warp & 1;
  const bool last = half == 1;                        // the half that scores take last; takes the rope sub-tile, too, which comes behind it
  const int tokens = min(p.page_size, kBlockTokens);  // a copy stays within a page
  if (warp == 0 && lane < 2 * Tr::kFullBarriers) barrier_init((&smem.k_full[0][0])[lane], 1);
  if (warp == 1 && lane < 4) barrier_init((&smem.k_empty[0][0])[lane], 4);
  if (warp == 2 && lane == 0) barrier_init(smem.q_full, 4), barrier_init(smem.announced, 4);
  if (warp == 3 && lane == 0) barrier_init(smem.q_empty, 8);
  if (lane == 0) tma_prefetch_map(last ? k_map : q_map);
  barrier_init_fence();
  Part part;
  const Cta cta{p, part};
  named_sync(kProducersReady, kWarpgroup);
  wait_for_predecessor();
  // The longest chain of loads at the start of a CTA: part, then length and pages, then keys.
  part = load_part<true>(p);
  if (warp == 0 && lane == 0) smem.part = part;
  named_arrive(kStart, kThreads);
  if (lane != 0) return;
  Work w;
  Pages pages;
  auto prepare = [&](int at) {
    w = cta.work(at, cta.sequence(at));
    pages = load_pages(p, w, cta.first_block(at) + slot, tokens);  // as w.begin, where there is any block, but not behind the length's load
  };
  uint32_t k_phase = 1, q_phase = 1;
  for (int at = part.begin_seq; at <= cta.last_seq(); ++at) {
    prepare(at);
    // Queries before keys: nothing begins without them, and they would wait behind megabytes of keys.
    barrier_wait(smem.q_empty, q_phase);
    q_phase ^= 1;
    if (warp == 0) smem.work = w;  // published by the barrier
    barrier_expect(smem.q_full, 2 * kSubTileBytes);
    load_q<2>(q_map, smem.q_full, smem.q[2 * warp], cta, w.seq, 2 * warp);

    // All CTAs of a card start at once, and the memory is the bottleneck until their slots are full: slot 0 goes first, so that work can begin. The barrier is
    // not a phase further by then: the right half of slot 0 is refilled only after slot 1 was read.
    if (slot == 1 && at == part.begin_seq && w.begin + 1 < w.end) barrier_wait(smem.k_full[0][1], 0);
    // Combine takes an SM when it is free, and waits there for partial results: it may when a last piece is short, or what is left of it. Never before this
    // kernel's own wait, because it reads the plan at once, nor before what it could take for partial results is gone; a thread that has asked for keys has the
    // time to see to that.
    bool starts_combine = warp == 2 && at == cta.last_seq();
    auto start_combine = [&](int blocks) {
      if (!starts_combine || blocks > kShortPiece) return;
      barrier_wait(smem.announced, 0);
      __threadfence();
      let_successor_start();
      starts_combine = false;
    };
    for (int block = w.begin + slot; block < w.end; block += 2) {
      barrier_wait(smem.k_empty[slot][half], k_phase);
      k_phase ^= 1;
      if (last) smem.valid[slot] = pages.valid_groups;  // published by the barriers below
      const int t = cta.kv_head() * Tr::kSubTiles;
      load_k<Tr::kHalf>(k_map, smem.k_full[slot][half], smem.k[slot][half * Tr::kHalf], p, pages, block, tokens, t + half * Tr::kHalf);
      if constexpr (Tr::kRope)
        if (last) load_k<1>(rope_map, smem.k_full[slot][2], smem.k[slot][2 * Tr::kHalf], p, pages, block, tokens, t + 2 * Tr::kHalf);
      if (block + 2 < w.end) pages = load_pages(p, w, block + 2, tokens);
      start_combine(w.end - block);
    }
    start_combine(0);
  }
}

// ---- before the predecessor ends -----------------------------------------------------------------------------------------------------------------

// Brings this CTA's first block of keys to L2 while memory has little else to do, and queries, if it has the first piece of a sequence: asked for by all CTAs
// of a sequence at once they come late. A lane for each copy.
template <class Tr>
__device__ __forceinline__ void prefetch_operands(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& rope_map, const DenseDecodeParams& p,
                                                  int lane) {
  const int piece = lane / 4, tokens = min(p.page_size, kBlockTokens);
  const Part part = load_part<true>(p, true);
  if (part.begin_seq >= p.b) return;
  if (piece >= Tr::kFullBarriers) {
    const int t = 2 * (lane - 4 * Tr::kFullBarriers);
    if (t < 2 * Tr::kHalf && p.h_kv == 1 && part.begin_block <= 0) tma_prefetch(q_map, 0, blockIdx.x * kRowTile, t, 0, part.begin_seq);
    return;
  }
  if (lane % 4 * tokens >= kBlockTokens || blockIdx.x > 0) return;  // row tiles share keys
  const int token = min(max(part.begin_block, 0), p.max_len / kBlockTokens) * kBlockTokens + lane % 4 * tokens;
  const int column = token >> (__ffs(p.page_size) - 1);
  if (column >= p.max_pages) return;
  const int page = read_early(p.block_table[int64_t(part.begin_seq) * p.max_pages + column]);
  if (static_cast<unsigned>(page) >= static_cast<unsigned>(p.num_pages)) return;
  tma_prefetch(piece == 2 ? rope_map : k_map, 0, 0, blockIdx.y * Tr::kSubTiles + piece * Tr::kHalf, (page * p.page_size + (token & (p.page_size - 1))) / 8);
}

// ---- kernel and launcher ------------------------------------------------------------------------------------------------------------------------

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) dense_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                                                   const __grid_constant__ CUtensorMap rope_map, const __grid_constant__ DenseDecodeParams p) {
  extern __shared__ char raw[];
  auto& smem = *reinterpret_cast<Storage<Tr>*>(raw);
  // Broadcast, so that the compiler sees warp-uniform branches.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;

  if (warp == 7) prefetch_operands<Tr>(q_map, k_map, rope_map, p, lane);  // a warp that waits for keys
  // Without this ptxas takes the warps for divided, and adds 600 bytes to the loops.
  __syncwarp();
  if (warp >= 8)
    produce<Tr>(q_map, k_map, rope_map, p, smem, warp - 8, lane);
  else
    seesaw::compute<Tr>(p, smem, warp / 4, warp % 4, lane);
}

// The map of k_cache: [eight tokens of a page, head and sub-tile, token, 64] in boxes of all tokens of a page or block, and some sub-tiles.
template <class T>
Status encode_k_map(CUtensorMap& k_map, const DenseDecodeParams& p, int tiles) {
  const int64_t row = int64_t(p.h_kv) * p.d_qk, tokens = int64_t(p.num_pages) * p.page_size;
  return encode_map<T, 4>(k_map, p.k_cache, {64, 8, cuuint64_t(row / 64), cuuint64_t(tokens / 8)}, {row, 64, 8 * row},
                          {64, 8, cuuint32_t(tiles), cuuint32_t(std::min(p.page_size, kBlockTokens) / 8)});
}

template <class T, int kDqk>
Status launch_dense_decode(const DenseDecodeParams& p) {
  using Tr = Traits<T, kDqk, Keys::kPaged>;
  CUtensorMap q_map, k_map, rope_map;
  if (Status error = encode_q_map<2, T>(q_map, p)) return error;
  if (Status error = encode_k_map<T>(k_map, p, Tr::kHalf)) return error;
  if (Status error = encode_k_map<T>(rope_map, p, 1)) return error;
  const auto kernel = dense_decode_kernel<Tr>;
  constexpr size_t smem = sizeof(Storage<Tr>);
  if (cudaError_t err = allow_shared_memory(kernel, smem)) return cudaGetErrorString(err);
  const dim3 grid((p.rows + kRowTile - 1) / kRowTile, p.h_kv, p.num_parts);
  // Row tiles read the same keys. As clusters they run side by side and in step, and what both ask for is asked of L2 once (the log, state 59).
  const int cluster = grid.x % 2 == 0 ? 2 : 1;
  if (cudaError_t err = launch(kernel, {grid, kThreads, smem, cluster}, p.stream, q_map, k_map, rope_map, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla::dense_decode
