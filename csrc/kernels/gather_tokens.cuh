// The producers of the sparse kernels: they fill the K slots of the seesaw with the tokens that a list of indices names.
//
// A query token is a sequence of the schedule: its keys are the blocks of 64 of its list, then those of its second list. A warp brings 16 of a block's 64
// tokens: CopyRows those that are as they will be, by cp.async; ConvertRows fp8, which become bfloat16 in the slot, and for which it tells the compute warps
// what to ask the copy engine for. Entries are fetched two blocks ahead, scales and the way of rows to L2 begin a block ahead, across the ends of blocks and
// sequences. Registers are short, so what can be had again is not kept.
// docs/kernels/sparse_decode.md, docs/kernels/sparse_prefill.md.
#pragma once

#include <type_traits>

#include "attention/fp8.cuh"
#include "hopper/barrier.cuh"
#include "hopper/gather.cuh"
#include "hopper/launch.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "kernels/seesaw.cuh"

namespace jax_flashmla::seesaw {

constexpr Keys keys_of(KVFormat format, int align = 16) {
  return format == KVFormat::kPlain ? Keys::kCopied : align == 16 ? Keys::kConverted : Keys::kUnaligned;
}

constexpr int kListAhead = 2 * kBlockTokens;  // entries

// What the list has for two rows of the block, and of which source they are slots; where they are none there is no token.
struct Entries {
  int index[2], source;
};

// A warp's walk over the blocks of a part, from list to list and from sequence to sequence. A step within a list takes four instructions; what the next list
// needs is in shared memory, because registers are short.
template <class Tr>
class Cursor {
 public:
  // Of lanes that fetch entries `row` and `row` + 8 of a block.
  __device__ __forceinline__ Cursor(const Cta& cta, const SparseDecodeParams& p, Walk& at, int row) : cta_(cta), p_(p), at_(at), row_(row) {
    if (lane_again() == 0) at = {cta.part.begin_seq - 1, 0, 0, {0, 0}};
    __syncwarp();
    enter();
  }

  __device__ __forceinline__ Entries fetch() const {
    if (row_ % 32 == 0 && left_ > kListAhead) prefetch_l2(list_ + kListAhead);
    return {{int(gather_word<4>(list_, left_ > 0, ~0u)), int(gather_word<4>(list_ + 8, left_ > 8, ~0u))}, source_};
  }

  __device__ __forceinline__ void advance() {
    if (--blocks_ == 0)
      enter();
    else
      list_ += kBlockTokens, left_ -= kBlockTokens;
  }

 private:
  // Goes on to the next list of this or of a later sequence. Behind the last one there are blocks without entries.
  __device__ __forceinline__ void enter() {
    Walk walk = at_;
    while (walk.block >= walk.end && walk.seq < cta_.last_seq()) {
      const Work w = cta_.work(++walk.seq);
      walk.block = w.begin, walk.end = w.end;
#pragma unroll
      for (int i = 0; i < (Tr::kPrefill ? 1 : 2); ++i) {
        const SparseSource& source = p_.sources[i];
        walk.entries[i] = !source.cache ? 0 : source.topk_length ? min(max(source.topk_length[walk.seq], 0), source.topk) : source.topk;
      }
    }
    const int first_blocks = (walk.entries[0] + kBlockTokens - 1) / kBlockTokens;
    source_ = !Tr::kPrefill && walk.block >= first_blocks;
    const int position = (walk.block - (source_ ? first_blocks : 0)) * kBlockTokens + row_;
    const SparseSource& source = source_ ? p_.sources[1] : p_.sources[0];
    list_ = source.indices + int64_t(walk.seq) * source.topk + position;
    left_ = walk.block >= walk.end ? -(1 << 30) : (source_ ? walk.entries[1] : walk.entries[0]) - position;
    const int end = Tr::kPrefill || source_ ? walk.end : min(walk.end, first_blocks);
    blocks_ = walk.block >= walk.end ? 0 : end - walk.block;  // 0: for ever
    walk.block = end;
    __syncwarp();
    if (lane_again() == 0) at_ = walk;
    __syncwarp();
  }

  const Cta& cta_;
  const SparseDecodeParams& p_;
  Walk& at_;
  const int row_;
  const int* list_;  // this lane's entry of the block
  int left_;         // entries from there on, none when negative
  int blocks_;       // of the piece in this list, from this one on
  int source_;
};

// Rows that are copied as they are. Eight lanes copy 128 bytes of a token, so a warp has four tokens in a copy: cp.async of whole lines, and few of them.
template <class Tr>
class CopyRows {
 public:
  static constexpr int kRowBytes = 128 * Tr::kSubTiles;

  __device__ __forceinline__ CopyRows(const SparseDecodeParams& p, Storage<Tr>& smem, int warp) : p_(p), smem_(smem), warp_(warp) {}

  // A barrier has half of a slot, of which every thread copied a part; behind the first half of a slot valid[] is there, too.
  static __device__ int arrivals(int barrier) { return kWarpgroup + (barrier == 0 ? 4 : 0); }

  // Whose entries a lane fetches: eight lanes have all sixteen of the warp.
  static __device__ __forceinline__ int row(int warp, int lane) { return 16 * warp + (lane & 7); }

  __device__ __forceinline__ void start(Cursor<Tr>& cursor) {
    entries_ = cursor.fetch();
    next(cursor);
  }

  // Fills a slot with the block before the one that the cursor points to.
  __device__ __forceinline__ void block(Cursor<Tr>& cursor, int slot, uint32_t phase, int) {
    const uint32_t valid = valid_;
    const char* row[4] = {row_[0], row_[1], row_[2], row_[3]};
    barrier_wait(smem_.k_empty[slot][0], phase);
    if (lane_again() == 0) {
      reinterpret_cast<uint16_t*>(&smem_.valid[slot])[warp_] = uint16_t(valid);
      barrier_arrive(smem_.k_full[slot][0]);
    }
    copy<0>(slot, row);
    next(cursor);
    barrier_wait(smem_.k_empty[slot][1], phase);
    copy<1>(slot, row);
    if (p_.prefetch) prefetch();
  }

 private:
  // Starts the next block on its way to L2. The other row tile of a cluster of two brings the same tokens, so each does half of them.
  __device__ __forceinline__ void prefetch() const {
    const int lane = lane_again();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if ((lane & 7) == 0 && row_[j] && (gridDim.x % 2 != 0 || j % 2 == (blockIdx.x & 1))) prefetch_l2(row_[j], kRowBytes);
  }

  template <int kHalf>
  __device__ __forceinline__ void copy(int slot, const char* const (&row)[4]) const {
    const int lane = lane_again();
    const uint32_t to = smem_address(smem_.k[slot][0]) + (16 * warp_ + lane / 8) * 128;
#pragma unroll
    for (int t = kHalf * Tr::kHalf; t < (kHalf ? Tr::kSubTiles : Tr::kHalf); ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) copy_async<16>(to + t * kSubTileBytes + 512 * j + (((lane & 7) ^ (4 * (j & 1) + lane / 8)) << 4), row[j] + t * 128, row[j]);
    barrier_arrive_behind_copies(smem_.k_full[slot][kHalf]);
  }

  // Goes on to the next block: where its tokens are, and the entries of the one behind it.
  __device__ __forceinline__ void next(Cursor<Tr>& cursor) {
    const int lane = lane_again();
    const SparseSource& source = entries_.source ? p_.sources[1] : p_.sources[0];
    auto exists = [&](int index) { return unsigned(index) < source.slots; };
    valid_ = (__ballot_sync(~0u, exists(entries_.index[0])) & 0xFF) | __ballot_sync(~0u, exists(entries_.index[1])) << 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int index = __shfl_sync(~0u, entries_.index[j / 2], 4 * (j & 1) + lane / 8);
      row_[j] = exists(index) ? static_cast<const char*>(source.cache) + int64_t(index) * kRowBytes + 16 * (lane & 7) : nullptr;
    }
    cursor.advance();
    entries_ = cursor.fetch();
  }

  const SparseDecodeParams& p_;
  Storage<Tr>& smem_;
  const int warp_;
  const char* row_[4];  // this lane's 16 bytes of tokens lane / 8 + 4 j of the warp, of the block; nullptr where there is none
  uint32_t valid_;      // a bit a token of the warp
  Entries entries_;     // of the next block
};

// Rows of fp8. Their codes come as they are into the left half of a slot, which is let go of first, and become bfloat16 from there. A warp's sixteen tokens,
// 512 bytes each, fill a sub-tile of that half. 128 columns of bfloat16 fill two sub-tiles of all warps: first those of the right half, then, when no warp has
// codes in shared memory any more, those of the left one.
template <class Tr, KVFormat kFormat, int kAlign>
class ConvertRows {
  using R = Fp8Layout<kFormat>;
  using Codes = uint4[2][2];                          // of 128 columns: of two tokens and their halves, this lane's sixteen
  static constexpr int kStaged = kSubTileBytes / 16;  // bytes that a token's codes have in the slot
  static constexpr int kRopeTile = 2 * Tr::kHalf;     // where rope is copied to
  static constexpr bool kRopeMoves = !Tr::kRope;      // and whether it goes on from there: it may be part of V
  static_assert(kRopeTile < Tr::kSlotTiles && R::kLatent == Tr::kCodes && R::kLatent <= kStaged && Tr::kFullBarriers == 4);

 public:
  static constexpr int kRowBytes = R::kRow;

  __device__ __forceinline__ ConvertRows(const SparseDecodeParams& p, Storage<Tr>& smem, int warp) : p_(p), smem_(smem), warp_(warp) {}

  static __device__ int arrivals(int) { return 4; }  // of warps

  // Whose entries a lane fetches: those of its two tokens.
  static __device__ __forceinline__ int row(int warp, int lane) { return 16 * warp + place(lane / 4); }

  __device__ __forceinline__ void start(Cursor<Tr>& cursor) {
    entries_ = cursor.fetch();
    next(cursor, 0);
    tell(0);
  }

  // Fills a slot with the block before the one that the cursor points to, which goes to slot `next_slot`.
  __device__ __forceinline__ void block(Cursor<Tr>& cursor, int slot, uint32_t phase, int next_slot) {
    const int lane = lane_again();
    const uint32_t valid = __reduce_or_sync(~0u, (row_[0] ? 1u << place(lane / 4) : 0u) | (row_[1] ? 256u << place(lane / 4) : 0u));
    barrier_wait(smem_.k_empty[slot][0], phase);
    copy(slot);
    const Fp8Scales scales[2] = {scales_of(scales_[0]), scales_of(scales_[1])};
    const bool exact = __all_sync(~0u, scales[0].exact && scales[1].exact);
    const uint32_t multipliers[2] = {exact ? scales[0].multipliers : scales_[0], exact ? scales[1].multipliers : scales_[1]};
    if (lane == 0) reinterpret_cast<uint16_t*>(&smem_.valid[slot])[warp_] = uint16_t(valid);
    if (Tr::kAsked && next_slot == slot) barrier_wait(smem_.k_staged[slot][warp_], phase ^ 1);  // these rows[] have been read
    next(cursor, next_slot);
    if (!Tr::kPrefill || p_.prefetch) prefetch();
    if (Tr::kAsked) barrier_wait(smem_.k_staged[slot][warp_], phase ^ 1);
    tell(next_slot);  // not earlier: all CTAs start at once, and what they need first would share the memory with what they need next
    if (!Tr::kAsked || kRopeMoves) wait_for_copies(), __syncwarp();
    barrier_wait(smem_.k_empty[slot][1], phase);
    if (exact)
      convert<true>(slot, multipliers);
    else
      convert<false>(slot, multipliers);
  }

 private:
  // Lanes 4g .. 4g + 3 have two tokens: row place(g) of the warp's sixteen, and the row 8 below. Eight lanes access shared memory at once, two rows. When they
  // store, these lie in different banks because the swizzle tells them apart in bit 0: every other chunk. When they load, because they take turns: odd rows
  // take the second half of 128 columns first.
  static __device__ __forceinline__ int place(int g) { return g ^ (g & 1) << 2; }  // its own inverse
  static __device__ __forceinline__ int half_of(int lane, int turn) { return turn ^ (lane >> 2 & 1); }
  // Where a chunk of 16 bytes of token i lies: rows of a sub-tile are 128 bytes.
  __device__ __forceinline__ uint32_t to(int lane, int slot, int t, int i, int chunk) const {
    return smem_address(smem_.k[slot][t]) + (row(warp_, lane) + 8 * i) * 128 + ((chunk ^ place(lane / 4)) << 4);
  }
  // Where the codes of token i are copied to.
  __device__ __forceinline__ uint32_t staged(int lane, int slot, int i) const {
    return smem_address(smem_.k[slot][warp_]) + (place(lane / 4) + 8 * i) * kStaged;
  }

  // Where token i of the next block is, and how far behind its scales.
  __device__ __forceinline__ const char* find(int i, int& scales) const {
    const auto* cache = static_cast<const char*>(entries_.source ? p_.sources[1].cache : p_.sources[0].cache);
    const unsigned index = unsigned(i ? entries_.index[1] : entries_.index[0]);
    if (index >= (entries_.source ? p_.sources[1].slots : p_.sources[0].slots)) return nullptr;
    if constexpr (kFormat == KVFormat::kFp8V4) {  // planes, and a page may be padded
      const unsigned page_size = unsigned(entries_.source ? p_.sources[1].page_size : p_.sources[0].page_size);
      const unsigned page = index / page_size, offset = index % page_size;
      scales = int((page_size - offset) * R::kRow + offset * R::kScaleRow);
      return cache + page * (entries_.source ? p_.sources[1].page_bytes : p_.sources[0].page_bytes) + offset * R::kRow;
    } else {
      scales = R::kScale;
      return cache + int64_t(index) * R::kRow;
    }
  }

  // Goes on to the next block, which is for this slot: its scales start to load, and the entries of the one behind it.
  __device__ __forceinline__ void next(Cursor<Tr>& cursor, int slot) {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      constexpr int kShare = R::kTile == 64 ? 2 : 4;
      int scales = 0;
      row_[i] = find(i, scales);
      scales_[i] = gather_word<kShare>(row_[i] + scales + kShare * (lane & 3), row_[i], 0);
    }
    if constexpr (Tr::kAsked) {  // where there is no token, from anywhere: all codes are finite numbers here
      const char* own = lane & 1 ? row_[1] : row_[0];
      if ((lane & 2) == 0) smem_.rows[slot][row(warp_, lane) + 8 * (lane & 1)] = own ? own : p_.q;
    }
    cursor.advance();
    entries_ = cursor.fetch();
  }

  // Tells the compute warps where the codes of the next block are.
  __device__ __forceinline__ void tell(int slot) const {
    if (!Tr::kAsked) return;
    __syncwarp();
    if (lane_again() == 0) barrier_arrive(smem_.k_rows[slot]);
  }

  // Starts the next block on its way to L2, lines of 128 bytes. The other row tile of a cluster of two brings the same tokens, so each does half of them.
  __device__ __forceinline__ void prefetch() const {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!row_[i] || (gridDim.x % 2 == 0 && i != (blockIdx.x & 1))) continue;
#pragma unroll
      for (int o = 0; o < R::kRow; o += 512) prefetch_l2(row_[i] + min(o + 128 * (lane & 3), R::kRow - 1));
    }
  }

  // This lane's scales are those of sub-tiles 2 (lane & 3) and the one behind.
  static __device__ __forceinline__ Fp8Scales scales_of(uint32_t scale) {
    return R::kTile == 64 ? Fp8Scales::of_e8m0(scale & 0xFF, scale >> 8) : Fp8Scales::of_float(scale);
  }

  // Copies rope, and codes where nobody else does.
  __device__ __forceinline__ void copy(int slot) const {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int chunk = lane & 3; chunk < 8; chunk += 4) copy_async<kAlign>(to(lane, slot, kRopeTile, i, chunk), row_[i] + R::kRope + 16 * chunk, row_[i]);
      if constexpr (!Tr::kAsked)
        for (int o = 16 * (lane & 3); o < R::kLatent; o += 64) copy_async<kAlign>(staged(lane, slot, i) + o, row_[i] + o, row_[i]);
    }
  }

  // kExact: one multiplication by a multiplier does it; else `scales` are as in the cache.
  template <bool kExact>
  __device__ __forceinline__ void convert(int slot, const uint32_t (&scales)[2]) const {
    Codes a, b;
    load(a, slot, 2);
    load(b, slot, 3);
    store<kExact>(a, slot, 2, scales);
    load(a, slot, 0);
    store<kExact>(b, slot, 3, scales);
    load(b, slot, 1);
    named_sync(kProducersReady, kWarpgroup);
    store<kExact>(a, slot, 0, scales);
    wait_for_copies();  // of rope, which scores wait for with the rest
    store<kExact>(b, slot, 1, scales);
  }

  __device__ __forceinline__ void load(Codes& codes, int slot, int columns) const {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) codes[i][turn] = load_shared(staged(lane, slot, i) + 128 * columns + 64 * half_of(lane, turn) + 16 * (lane & 3));
  }

  template <bool kExact>
  __device__ __forceinline__ void store(const Codes& codes, int slot, int columns, const uint32_t (&scales)[2]) const {
    const int lane = lane_again();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = __shfl_sync(~0u, scales[i], (lane & ~3) | columns);
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        const int half = half_of(lane, turn);
        uint4 out[2];
        if constexpr (kExact)
          dequantize(out, codes[i][turn], R::kTile == 64 ? permute_bytes(two, half ? 0x3232 : 0x1010) : two);
        else
          dequantize_slowly(out, codes[i][turn], R::kTile == 64 ? e8m0(two >> (8 * half) & 0xFF) : __uint_as_float(two));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int chunk = 2 * (lane & 3) + j;
          if (kRopeMoves && half == 1 && columns == 3) out[j] = load_shared(to(lane, slot, kRopeTile, i, chunk));
          store_shared(to(lane, slot, 2 * columns + half, i, chunk), out[j]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(smem_.k_full[slot][columns]);
  }

  const SparseDecodeParams& p_;
  Storage<Tr>& smem_;
  const int warp_;
  const char* row_[2];  // of the block; nullptr where there is no token
  Entries entries_;     // of the next block
  uint32_t scales_[2];  // of the block
};

// Brings the first two blocks of this CTA to L2 before the predecessor ends, while memory has little else to do: four tokens a lane, and each of two row tiles
// half of them. Out of line, so that the loops stay where they are: in other places they take up to 5 % longer.
template <class Producer>
__device__ __noinline__ void prefetch_keys(const SparseDecodeParams& p, int lane) {
  constexpr int kRow = Producer::kRowBytes;
  const Part part = load_part(p, true);
  if (part.begin_seq >= p.b) return;
  const SparseSource& source = p.sources[0];
  const int first = min(max(part.begin_block, 0), source.topk / kBlockTokens) * kBlockTokens;
  int index[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int entry = first + 32 * i + lane;
    const bool own = entry < source.topk && (gridDim.x % 2 != 0 || i % 2 == (blockIdx.x & 1));
    index[i] = own ? read_early(source.indices[int64_t(part.begin_seq) * source.topk + entry]) : -1;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (unsigned(index[i]) >= source.slots) continue;
    const char* row = static_cast<const char*>(source.cache) + index[i] / source.page_size * source.page_bytes + int64_t(index[i] % source.page_size) * kRow;
#pragma unroll
    for (int o = 0; o < kRow; o += 128) prefetch_l2(row + o);
  }
}

template <class Tr, class Producer>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const SparseDecodeParams& p, Storage<Tr>& smem, int warp, int lane) {
  cutlass::arch::warpgroup_reg_dealloc<Tr::kProducerRegisters>();
  constexpr int kFull = Tr::kFullBarriers;
  if (warp == 0 && lane < 2 * kFull) barrier_init((&smem.k_full[0][0])[lane], Producer::arrivals(lane % kFull));
  if (warp == 1 && lane < 4) barrier_init((&smem.k_empty[0][0])[lane], 4);
  if (warp == 2 && lane == 0) barrier_init(smem.q_full, 1);
  if (warp == 2 && lane < 2) barrier_init(smem.k_rows[lane], 4);
  if (warp == 3 && lane == 0) barrier_init(smem.q_empty, 8);
  if (lane < 2) barrier_init(smem.k_staged[lane][warp], 1);
  if (warp == 0 && lane == 0) tma_prefetch_map(q_map);
  barrier_init_fence();
  const Cta cta{p, smem.part};  // not in registers, of which there are none to spare
  named_sync(kProducersReady, kWarpgroup);
  wait_for_predecessor();
  if (warp == 0 && lane == 0) smem.part = load_part(p);
  named_sync(kProducersReady, kWarpgroup);
  named_arrive(kStart, kThreads);

  Cursor<Tr> cursor(cta, p, smem.walk[warp], Producer::row(warp, lane));
  Producer gather(p, smem, warp);
  gather.start(cursor);
  uint32_t k_phases = 3, q_phase = 1;  // a bit a slot
  for (int seq = smem.part.begin_seq; seq <= cta.last_seq(); ++seq) {
    const Work w = cta.work(seq);
    if (warp == 0 && lane_again() == 0) {
      barrier_wait(smem.q_empty, q_phase);
      smem.work = w;  // published by the barrier
      if (Tr::kAsked) smem.next_blocks = seq < cta.last_seq() ? cta.work(seq + 1).blocks() : 0;
      barrier_expect(smem.q_full, 2 * Tr::kHalf * kSubTileBytes);
      load_q<2 * Tr::kHalf>(q_map, smem.q_full, smem.q[0], cta, seq, 0);
    }
    __syncwarp();
    q_phase ^= 1;
    for (int i = 0; i < w.end - w.begin; ++i) {
      gather.block(cursor, i & 1, k_phases >> (i & 1) & 1, i + 1 < w.end - w.begin ? i + 1 & 1 : 0);
      k_phases ^= 1 << (i & 1);
    }
  }
}

// What a thread of a sparse kernel does.
template <class Tr, KVFormat kFormat, int kAlign, class Params>
__device__ __forceinline__ void attend(const CUtensorMap& q_map, const Params& p, Storage<Tr>& smem) {
  using Producer = std::conditional_t<kFormat == KVFormat::kPlain, CopyRows<Tr>, ConvertRows<Tr, kFormat, kAlign>>;
  // Broadcast, so that the compiler sees warp-uniform branches.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  // By a warp that waits for keys. Where lists may be split the kernel before is combine, behind which there is no time for it.
  if (!Tr::kPrefill && !p.num_splits && warp == 7) prefetch_keys<Producer>(p, lane);
  if (warp >= 8)
    produce<Tr, Producer>(q_map, p, smem, warp - 8, lane);
  else
    compute<Tr>(p, smem, warp / 4, warp % 4, lane);
}

template <class Tr, class Params>
Status launch_attend(void (*kernel)(CUtensorMap, Params), const Params& p) {
  CUtensorMap q_map;
  if (Status error = encode_q_map<2 * Tr::kHalf, typename Tr::T>(q_map, p)) return error;
  const dim3 grid((p.rows + kRowTile - 1) / kRowTile, 1, p.num_parts);
  const int cluster = grid.x % 2 == 0 ? 2 : 1;  // row tiles gather the same tokens: side by side, the second one finds them in L2
  constexpr size_t smem = sizeof(Storage<Tr>);
  if (cudaError_t err = allow_shared_memory(kernel, smem)) return cudaGetErrorString(err);
  if (cudaError_t err = launch(kernel, {grid, kThreads, smem, cluster}, p.stream, q_map, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla::seesaw
