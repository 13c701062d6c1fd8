// Dense MLA decode over a paged latent cache, sm_90a: the seesaw of seesaw.cuh, its K slots filled by TMA.
//
//   warpgroups 0, 1   compute
//   warpgroup 2       four producer threads, one per (K slot, output half): each refills its sub-tiles as soon as their readers let go. Also load Q.
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

// Columns 64t .. 64t+63 of a block of keys. A page of -1 lies outside of the map: zeros are written, and count as bytes.
template <class T>
__device__ __forceinline__ void load_k(const CUtensorMap& k_map, Barrier& full, T* dst, const DenseDecodeParams& p, const Cta& cta, const Pages& pages,
                                       int block, int tokens, int t) {
  if (tokens == kBlockTokens) {
    tma_load(k_map, full, dst, t * 64, cta.kv_head(), block * kBlockTokens & (p.page_size - 1), pages.id[0]);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c * tokens < kBlockTokens) tma_load(k_map, full, dst + c * tokens * 64, t * 64, cta.kv_head(), 0, pages.id[c]);
  }
}

template <class Tr>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const CUtensorMap& k_map, const DenseDecodeParams& p, Storage<Tr>& smem, int warp, int lane) {
  cutlass::arch::warpgroup_reg_dealloc<Tr::kProducerRegisters>();
  const int slot = warp >> 1, half = warp & 1;
  const bool own = slot == half;                      // the output half of the warpgroup that computes this slot's scores; takes the rope sub-tile too
  const int tokens = min(p.page_size, kBlockTokens);  // a copy stays within a page
  if (warp == 0 && lane < 2 * Tr::kSubTiles) barrier_init((&smem.k_full[0][0])[lane], 1);
  if (warp == 1 && lane < 4) barrier_init((&smem.k_empty[0][0])[lane], 4);
  if (warp == 2 && lane == 0) barrier_init(smem.q_full, 4);
  if (warp == 3 && lane == 0) barrier_init(smem.q_empty, 8);
  if (lane == 0) tma_prefetch_map(own ? k_map : q_map);
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
    if (slot == 1 && at == part.begin_seq && w.begin + 1 < w.end) barrier_wait(smem.k_full[0][Tr::kHalf], 0);
    for (int block = w.begin + slot; block < w.end; block += 2) {
      barrier_wait(smem.k_empty[slot][half], k_phase);
      k_phase ^= 1;
      if (own) smem.valid[slot] = pages.valid_groups;  // published by the barriers below
      auto load = [&](int t) {
        barrier_expect(smem.k_full[slot][t], kSubTileBytes);
        load_k(k_map, smem.k_full[slot][t], smem.k[slot][t], p, cta, pages, block, tokens, t);
      };
#pragma unroll 1
      for (int t = half * Tr::kHalf; t < (half + 1) * Tr::kHalf; ++t) load(t);
      if (Tr::kRope && own) load(Tr::kSubTiles - 1);
      if (block + 2 < w.end) pages = load_pages(p, w, block + 2, tokens);
    }
  }
}

// ---- before the predecessor ends -----------------------------------------------------------------------------------------------------------------

// Brings this CTA's first keys to L2 while memory has little else to do: a lane for each sub-tile of the two slots.
template <class Tr>
__device__ __forceinline__ void prefetch_keys(const CUtensorMap& k_map, const DenseDecodeParams& p, int lane) {
  const int slot = lane / Tr::kSubTiles, t = lane % Tr::kSubTiles, tokens = min(p.page_size, kBlockTokens), page_bits = __ffs(p.page_size) - 1;
  if (slot > 1 || blockIdx.x > 0) return;  // row tiles share keys
  const Part part = load_part<true>(p, true);
  if (part.begin_seq >= p.b) return;
  const int first = (min(max(part.begin_block, 0), p.max_len / kBlockTokens) + slot) * kBlockTokens;
  const int* table = p.block_table + int64_t(part.begin_seq) * p.max_pages;
  int pages[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int column = (first + c * tokens) >> page_bits;
    pages[c] = c * tokens < kBlockTokens && column < p.max_pages ? read_early(table[column]) : -1;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (static_cast<unsigned>(pages[c]) < static_cast<unsigned>(p.num_pages)) tma_prefetch(k_map, t * 64, blockIdx.y, first & (p.page_size - 1), pages[c]);
}

// ---- kernel and launcher ------------------------------------------------------------------------------------------------------------------------

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ DenseDecodeParams p) {
  extern __shared__ char raw[];
  auto& smem = *reinterpret_cast<Storage<Tr>*>(raw);
  // Broadcast, so that the compiler sees warp-uniform branches.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;

  if (warp == 7) prefetch_keys<Tr>(k_map, p, lane);  // a warp that waits for keys
  // Without this ptxas takes the warps for divided, and adds 600 bytes to the loops.
  __syncwarp();
  if (warp >= 8)
    produce<Tr>(q_map, k_map, p, smem, warp - 8, lane);
  else
    seesaw::compute<Tr>(p, smem, warp / 4, warp % 4, lane);
}

template <class T, int kDqk>
Status launch_dense_decode(const DenseDecodeParams& p) {
  using Tr = Traits<T, kDqk, Keys::kPaged>;
  CUtensorMap q_map, k_map;
  if (Status error = encode_q_map<2, T>(q_map, p)) return error;
  const int64_t d = p.d_qk;
  if (Status error = encode_map<T, 4>(k_map, p.k_cache, {cuuint64_t(d), cuuint64_t(p.h_kv), cuuint64_t(p.page_size), cuuint64_t(p.num_pages)},
                                      {d, p.h_kv * d, int64_t(p.page_size) * p.h_kv * d}, {64, 1, cuuint32_t(std::min(p.page_size, kBlockTokens)), 1}))
    return error;
  const auto kernel = dense_decode_kernel<Tr>;
  constexpr size_t smem = sizeof(Storage<Tr>);
  if (cudaError_t err = allow_shared_memory(kernel, smem)) return cudaGetErrorString(err);
  const dim3 grid((p.rows + kRowTile - 1) / kRowTile, p.h_kv, p.num_parts);
  // Row tiles read the same keys. As clusters they run side by side and in step, and what both ask for is asked of L2 once (the log, state 59).
  const int cluster = grid.x % 2 == 0 ? 2 : 1;
  if (cudaError_t err = launch(kernel, {grid, kThreads, smem, cluster}, p.stream, q_map, k_map, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla::dense_decode
