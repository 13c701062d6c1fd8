// Sparse MLA decode, sm_90a: the seesaw of seesaw.cuh, its K slots filled with the tokens that a list of indices names.
//
//   warpgroups 0, 1   compute
//   warpgroup 2       gather: a warp brings 16 of a block's 64 tokens, a sub-tile after the other, and makes bfloat16 of fp8. One thread also loads Q.
//
// A query token is a sequence of the schedule: its keys are the blocks of 64 of its list, then those of its second list. Lanes 4g .. 4g + 3 of a warp read
// two tokens. Three steps hide the memory: entries are fetched two blocks ahead, rows are on their way to L2 a block ahead, and codes to registers two
// sub-tiles ahead, across the ends of blocks and sequences. Registers are short, so what can be had again is not kept. docs/kernels/sparse_decode.md.
#pragma once

#include <algorithm>

#include "attention/fp8.cuh"
#include "hopper/barrier.cuh"
#include "hopper/gather.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "kernels/rows.cuh"
#include "kernels/seesaw.cuh"
#include "kernels/sparse_decode.h"

namespace jax_flashmla::sparse_decode {

using namespace seesaw;  // NOLINT: this kernel is one of its two halves

// A token's row as this kernel sees it: fp8 codes, of which kTile share a scale, and what is copied as it is.
template <int kDqk, KVFormat kFormat>
struct TokenRow {
  using Layout = Fp8Layout<kFormat>;
  static constexpr int kBytes = Layout::kRow, kFp8 = Layout::kLatent, kPlainOffset = Layout::kRope, kTile = Layout::kTile;
};
template <int kDqk>
struct TokenRow<kDqk, KVFormat::kPlain> {
  static constexpr int kBytes = 2 * kDqk, kFp8 = 0, kPlainOffset = 0, kTile = 0;
};

constexpr int kListAhead = 2 * kBlockTokens;  // entries

// What the list has for two rows of the block, and of which source they are slots; where they are none there is no token.
struct Entries {
  int index[2], source;
};

// A warp's walk over the blocks of a part, from sequence to sequence. In shared memory, because registers are short.
struct Cursor {
  const Cta& cta;
  const SparseDecodeParams& p;
  Walk& at;

  __device__ __forceinline__ void start() { settle({cta.part.begin_seq - 1, 0, 0, {0, 0}}); }
  __device__ __forceinline__ void advance() {
    Walk walk = at;
    ++walk.block;
    settle(walk);
  }

  __device__ __forceinline__ Entries fetch(int row) const {
    const Walk walk = at;
    const int first_blocks = (walk.entries[0] + kBlockTokens - 1) / kBlockTokens;
    const int source = walk.block >= first_blocks && walk.block < walk.end;
    const int position = (walk.block - (source ? first_blocks : 0)) * kBlockTokens + row;
    const int entries = walk.block >= walk.end ? 0 : source ? walk.entries[1] : walk.entries[0];
    const int* list = (source ? p.sources[1].indices : p.sources[0].indices) + int64_t(walk.seq) * (source ? p.sources[1].topk : p.sources[0].topk) + position;
    if (row % 32 == 0 && position + kListAhead < entries) prefetch_l2(list + kListAhead);
    return {{int(gather_word<4>(list, position < entries, ~0u)), int(gather_word<4>(list + 8, position + 8 < entries, ~0u))}, source};
  }

 private:
  __device__ __forceinline__ void settle(Walk walk) {
    while (walk.block >= walk.end && walk.seq < cta.last_seq()) {
      const Work w = cta.work(++walk.seq);
      walk.block = w.begin, walk.end = w.end;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const SparseSource& source = p.sources[i];
        walk.entries[i] = !source.cache ? 0 : source.topk_length ? min(max(source.topk_length[walk.seq], 0), source.topk) : source.topk;
      }
    }
    __syncwarp();
    if (lane_again() == 0) at = walk;
    __syncwarp();
  }
};

template <class Tr, KVFormat kFormat, int kAlign>
class Gather {
  using R = TokenRow<64 * Tr::kSubTiles, kFormat>;
  using Codes = uint4[2][2];                                                 // of two sub-tiles and two tokens: this lane's sixteen
  static constexpr int kFp8Tiles = R::kFp8 / 64, kLast = Tr::kSubTiles - 1;  // a sub-tile is 64 columns
  static_assert((kFp8Tiles == kLast || kFp8Tiles == 0) && Tr::kHalf == 4);

 public:
  __device__ __forceinline__ Gather(const SparseDecodeParams& p, Storage<Tr>& smem, int warp) : p_(p), smem_(smem), warp_(warp) {}

  // At the barrier of a sub-tile: of warps that stored, of threads that copied.
  static __device__ int arrivals(int t) { return (t < kFp8Tiles ? 4 : 128) + (t == kLast ? 4 : 0); }

  __device__ __forceinline__ void start(Cursor& cursor) {
    const int lane = lane_again();
    cursor.start();
    entries_ = cursor.fetch(row(lane));
    next(cursor);
  }

  // Fills a slot with the block before the one that the cursor points to.
  __device__ __forceinline__ void block(Cursor& cursor, int slot, uint32_t phase) {
    const int lane = lane_again();
    const uint32_t valid = __reduce_or_sync(~0u, (row_[0] ? 1u << place(lane) : 0u) | (row_[1] ? 256u << place(lane) : 0u));
    barrier_wait(smem_.k_empty[slot][0], phase);
    if (lane == 0) reinterpret_cast<uint16_t*>(&smem_.valid[slot])[warp_] = uint16_t(valid);  // read behind the last sub-tile's barrier
    if constexpr (kFp8Tiles == 0) {
#pragma unroll 1
      for (int t = 0; t < Tr::kSubTiles; ++t) {
        if (t == Tr::kHalf) barrier_wait(smem_.k_empty[slot][1], phase);
        if (t < 2) prefetch(t);
        copy(slot, t);
      }
      next(cursor);
    } else {
      const Fp8Scales scales[2] = {scales_of(scales_[0]), scales_of(scales_[1])};
      if (__all_sync(~0u, scales[0].exact && scales[1].exact))
        convert<true>(cursor, slot, phase, {scales[0].multipliers, scales[1].multipliers});
      else
        convert<false>(cursor, slot, phase, {scales_[0], scales_[1]});
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(smem_.k_full[slot][kLast]);
  }

 private:
  // The first token of a thread is this row of the warp's sixteen, the second one the row 8 below. Eight lanes store at once: two rows, which lie in
  // different banks when the swizzle tells them apart in bit 0 (fp8: every other chunk) and in bit 2 (plain: half of the chunks).
  static __device__ __forceinline__ int place(int lane) { return lane / 4 ^ (lane / 4 & 1) << 2; }
  __device__ __forceinline__ int row(int lane) const { return 16 * warp_ + place(lane); }
  // Where a chunk of 16 bytes of token i lies: rows of a sub-tile are 128 bytes.
  __device__ __forceinline__ uint32_t to(int lane, int slot, int t, int i, int chunk) const {
    return smem_address(smem_.k[slot][t]) + (row(lane) + 8 * i) * 128 + ((chunk ^ place(lane)) << 4);
  }

  // Where token i of the next block is, and how far behind its scales.
  __device__ __forceinline__ const char* find(int i, int& scales) const {
    const auto* cache = static_cast<const char*>(entries_.source ? p_.sources[1].cache : p_.sources[0].cache);
    const unsigned index = unsigned(i ? entries_.index[1] : entries_.index[0]);
    if (index >= (entries_.source ? p_.sources[1].slots : p_.sources[0].slots)) return nullptr;
    if constexpr (kFormat == KVFormat::kFp8V4) {  // planes, and a page may be padded
      const unsigned page_size = unsigned(entries_.source ? p_.sources[1].page_size : p_.sources[0].page_size);
      const unsigned page = index / page_size, offset = index % page_size;
      scales = int((page_size - offset) * R::kBytes + offset * R::Layout::kScaleRow);
      return cache + page * (entries_.source ? p_.sources[1].page_bytes : p_.sources[0].page_bytes) + offset * R::kBytes;
    } else {
      if constexpr (kFormat == KVFormat::kFp8V32) scales = R::Layout::kScale;
      return cache + int64_t(index) * R::kBytes;
    }
  }

  // Starts token i of the next block on its way to L2. Not both at once: of many, some get lost.
  __device__ __forceinline__ void prefetch(int i) const {
    const int lane = lane_again();
    int scales = 0;
    const char* row = find(i, scales);
    if (!row) return;
#pragma unroll
    for (int o = 0; o < R::kBytes; o += 512) prefetch_l2(row + min(o + 128 * (lane & 3), R::kBytes - 1));  // lines of 128 bytes
    if (kFormat == KVFormat::kFp8V4 && (lane & 3) == 0) prefetch_l2(row + scales);
  }

  // Goes on to the next block: what it begins with starts to load, and the entries of the one behind it.
  __device__ __forceinline__ void next(Cursor& cursor) {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      constexpr int kShare = R::kTile == 64 ? 2 : 4;
      int scales = 0;
      row_[i] = find(i, scales);
      if (kFp8Tiles > 0) scales_[i] = gather_word<kShare>(row_[i] + scales + kShare * (lane & 3), row_[i], 0);
    }
    if constexpr (kFp8Tiles > 0) load(a_, 0);
    cursor.advance();
    entries_ = cursor.fetch(row(lane));
  }

  // This lane's scales are those of sub-tiles 2 (lane & 3) and the one behind.
  static __device__ __forceinline__ Fp8Scales scales_of(uint32_t scale) {
    return R::kTile == 64 ? Fp8Scales::of_e8m0(scale & 0xFF, scale >> 8) : Fp8Scales::of_float(scale);
  }

  // Starts the loads of sub-tiles t and t + 1. Zeros without a row: zero times anything finite is zero in the output.
  __device__ __forceinline__ void load(Codes& codes, int t) const {
    const int lane = lane_again();
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int i = 0; i < 2; ++i) codes[u][i] = gather<kAlign>(row_[i] + (t + u) * 64 + 16 * (lane & 3), row_[i] && t + u < kFp8Tiles);
  }

  // The sub-tiles of fp8, two by two, and the one behind them. Loads run two sub-tiles ahead, into the next block. kExact: one multiplication by a
  // multiplier does it; else `scales` are as in the cache.
  template <bool kExact>
  __device__ __forceinline__ void convert(Cursor& cursor, int slot, uint32_t phase, const uint32_t (&scales)[2]) {
    Codes b;
#pragma unroll
    for (int t = 0; t < 2 * Tr::kHalf; t += Tr::kHalf) {
      if (t > 0) barrier_wait(smem_.k_empty[slot][1], phase), copy(slot, kLast);
      if (kAlign == 16) load(b, t + 2), prefetch(t > 0);
      store<kExact>(slot, t, a_, scales);
      if (kAlign < 16) load(b, t + 2);  // twice as many loads: early they are too many for the registers
      if (t == 0)
        load(a_, Tr::kHalf);
      else
        next(cursor);
      store<kExact>(slot, t + 2, b, scales);
    }
  }

  template <bool kExact>
  __device__ __forceinline__ void store(int slot, int t, const Codes& codes, const uint32_t (&scales)[2]) const {
    const int lane = lane_again();
    uint32_t two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) two[i] = __shfl_sync(~0u, scales[i], (lane & ~3) | t / 2);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (t + u >= kFp8Tiles) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 out[2];
        if constexpr (kExact)
          dequantize(out, codes[u][i], R::kTile == 64 ? permute_bytes(two[i], u ? 0x3232 : 0x1010) : two[i]);
        else
          dequantize_slowly(out, codes[u][i], R::kTile == 64 ? e8m0(two[i] >> (8 * u) & 0xFF) : __uint_as_float(two[i]));
#pragma unroll
        for (int j = 0; j < 2; ++j) store_shared(to(lane, slot, t + u, i, 2 * (lane & 3) + j), out[j]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(smem_.k_full[slot][t + u]);
    }
  }

  // A sub-tile that is as it will be.
  __device__ __forceinline__ void copy(int slot, int t) const {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = 4 * half + (lane & 3);
        copy_async<kAlign>(to(lane, slot, t, i, chunk), row_[i] + R::kPlainOffset + (t - kFp8Tiles) * 128 + 16 * chunk, row_[i]);
      }
    barrier_arrive_behind_copies(smem_.k_full[slot][t]);
  }

  const SparseDecodeParams& p_;
  Storage<Tr>& smem_;
  const int warp_;
  const char* row_[2];  // of the block; nullptr where there is no token
  Entries entries_;     // of the next block
  Codes a_;             // sub-tiles 0 and 1 of the block, and its scales
  uint32_t scales_[2];
};

template <class Tr, KVFormat kFormat, int kAlign>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const SparseDecodeParams& p, Storage<Tr>& smem, int warp, int lane) {
  using Producer = Gather<Tr, kFormat, kAlign>;
  cutlass::arch::warpgroup_reg_dealloc<Tr::kProducerRegisters>();
  if (warp == 0 && lane < 2 * Tr::kSubTiles) barrier_init((&smem.k_full[0][0])[lane], Producer::arrivals(lane % Tr::kSubTiles));
  if (warp == 1 && lane < 4) barrier_init((&smem.k_empty[0][0])[lane], 4);
  if (warp == 2 && lane == 0) barrier_init(smem.q_full, 1);
  if (warp == 3 && lane == 0) barrier_init(smem.q_empty, 8);
  if (warp == 0 && lane == 0) tma_prefetch_map(q_map);
  barrier_init_fence();
  const Cta cta{p, smem.part};  // not in registers, of which there are none to spare
  named_sync(kProducersReady, kWarpgroup);
  wait_for_predecessor();
  if (warp == 0 && lane == 0) smem.part = load_part(p);
  named_sync(kProducersReady, kWarpgroup);
  named_arrive(kStart, kThreads);

  Cursor cursor{cta, p, smem.walk[warp]};
  Producer gather(p, smem, warp);
  gather.start(cursor);
  uint32_t k_phases = 3, q_phase = 1;  // a bit a slot
  for (int seq = smem.part.begin_seq; seq <= cta.last_seq(); ++seq) {
    const Work w = cta.work(seq);
    if (warp == 0 && lane_again() == 0) {
      barrier_wait(smem.q_empty, q_phase);
      smem.work = w;  // published by the barrier
      barrier_expect(smem.q_full, 2 * Tr::kHalf * kSubTileBytes);
#pragma unroll 1
      for (int t = 0; t < 2 * Tr::kHalf; ++t) load_q(q_map, smem.q_full, smem.q[t], cta, seq, t);
    }
    __syncwarp();
    q_phase ^= 1;
    for (int i = 0; i < w.end - w.begin; ++i) {
      gather.block(cursor, i & 1, k_phases >> (i & 1) & 1);
      k_phases ^= 1 << (i & 1);
    }
  }
}

// ---- kernel and launcher ------------------------------------------------------------------------------------------------------------------------

template <class Tr, KVFormat kFormat, int kAlign>
__global__ void __launch_bounds__(kThreads, 1) sparse_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ SparseDecodeParams p) {
  extern __shared__ char raw[];
  auto& smem = *reinterpret_cast<Storage<Tr>*>(raw);
  // Broadcast, so that the compiler sees warp-uniform branches.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;

  if (warp >= 8)
    produce<Tr, kFormat, kAlign>(q_map, p, smem, warp - 8, lane);
  else
    seesaw::compute<Tr>(p, smem, warp / 4, warp % 4, lane);
}

template <class T, int kDqk, KVFormat kFormat>
Status launch_sparse_decode(const SparseDecodeParams& p) {
  using Tr = Traits<T, kDqk, true>;
  CUtensorMap q_map;
  if (Status error = encode_q_map<T>(q_map, p)) return error;
  const dim3 grid((p.rows + kRowTile - 1) / kRowTile, 1, p.num_parts);
  const int cluster = grid.x % 2 == 0 ? 2 : 1;                  // row tiles gather the same tokens: side by side, the second one finds them in L2
  constexpr int kLeast = kFormat == KVFormat::kFp8V4 ? 8 : 16;  // rows in pages of an odd number of v4 tokens, which end in scales, are not aligned
  const bool aligned = (p.sources[0].page_bytes | p.sources[1].page_bytes) % 16 == 0;
  const auto kernel = aligned ? sparse_decode_kernel<Tr, kFormat, 16> : sparse_decode_kernel<Tr, kFormat, kLeast>;
  constexpr size_t smem = sizeof(Storage<Tr>);
  if (cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem)) return cudaGetErrorString(err);
  if (cudaError_t err = launch(kernel, {grid, kThreads, smem, cluster}, p.stream, q_map, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla::sparse_decode
