// The compute warpgroups of the decode kernels, their shared memory and their protocol with the producers, whoever fills the K slots.
//
// One CTA owns a tile of 64 packed query rows (token x head) of one KV head and walks the KV blocks of one part of the schedule, sequence after
// sequence. The 64x512 float32 output is half of an SM's registers, so two warpgroups split it by columns and each computes the scores of its own
// blocks; probabilities go through shared memory, so that both halves accumulate both blocks ("seesaw"): while one warpgroup is in its softmax the
// other keeps the tensor cores busy.
//
//   warpgroup 0   block 2j:   S0 = Q.K0, P0 = softmax -> smem | O[:, :256] += P0.V0 (registers) | O[:, :256] += P1.V1 (smem)
//   warpgroup 1   block 2j+1: S1 = Q.K1                       | O[:, 256:] += P0.V0 (smem) | P1 -> smem | O[:, 256:] += P1.V1 (registers)
//
// Probabilities are handed over in two halves of 32 tokens, each with its own barrier, so that products start behind half a softmax.
//
// Shared memory (232,448 bytes, all there is): two K slots as large as nine 64x64 sub-tiles, Q without rope (eight), P0, P1, reference maxima, row sums,
// barriers. The rope part of Q (a 64x64 tile) lives in registers of both warpgroups: it would not fit. Registers: 224 (O 128, S 32, P 16, rope 16),
// producer 56.
//
// V is the first 512 columns of K, read M-major out of the same bytes: the left half of a slot feeds warpgroup 0, the right half warpgroup 1.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/finish.cuh"
#include "attention/fragment.cuh"
#include "attention/softmax.cuh"
#include "hopper/barrier.cuh"
#include "hopper/gather.cuh"
#include "hopper/launch.cuh"
#include "hopper/relaxed.cuh"
#include "hopper/warp.cuh"
#include "hopper/wgmma.cuh"
#include "kernels/decode_work.cuh"
#include "splitkv/partial.cuh"

namespace jax_flashmla::seesaw {

constexpr int kThreads = 384, kComputeThreads = 256, kWarpgroup = 128;

// How keys come. kPaged: the tokens of a sequence in order, by TMA; rows see them up to some length, and a bit tells for 16 of them whether their page is
// there. Else gathered one by one, and each has a bit that tells whether it is there; rows of those that are not hold finite numbers. kCopied: half of a slot
// at once. kConverted: from fp8, 128 columns at once, by threads that need registers; compute warps ask the copy engine for the codes. kUnaligned: the same,
// but codes are not aligned for the copy engine, and who converts them copies them.
enum class Keys { kPaged, kCopied, kConverted, kUnaligned };

// kPrefill: rows also tell their largest score, and keys come from one list alone.
template <class T_, int kDqk, Keys kKeys, bool kPrefill_ = false>
struct Traits {
  using T = T_;
  static constexpr bool kGathered = kKeys != Keys::kPaged, kConverted = kKeys >= Keys::kConverted, kAsked = kKeys == Keys::kConverted, kPrefill = kPrefill_;
  using Valid = std::conditional_t<kGathered, uint64_t, uint32_t>;
  static constexpr int kComputeRegisters = kConverted ? 208 : 224, kProducerRegisters = kConverted ? 88 : 56;
  static_assert(2 * kComputeRegisters + kProducerRegisters == 3 * 168);  // what the CTA is given; asking for more waits for ever
  static constexpr bool kRope = kDqk > kDv;
  static constexpr int kCodes = kDqk - 64;  // fp8 numbers of a token
  static constexpr int kSubTiles = kDqk / 64;
  static constexpr int kHalf = kDv / 2 / 64;                     // sub-tiles of an output half
  static constexpr int kSlotTiles = kConverted ? 9 : kSubTiles;  // rows of fp8 need one to get ready in when d_qk is 512
  // In k_full: one for each half of the slot and for rope, for each half with rope, or for each step of the conversion, of which the scores wait for all.
  static constexpr int kFullBarriers = kKeys == Keys::kPaged ? 2 + kRope : kKeys == Keys::kCopied ? 2 : kHalf;
  static __host__ __device__ constexpr int barrier_of(int t) { return kKeys == Keys::kPaged ? t / kHalf : kKeys == Keys::kCopied ? t >= kHalf : t / 2 % kHalf; }
  // How the half of a slot lies that an output half is made of: in sub-tiles, or eight tokens of all its columns behind the eight before, because few copies
  // bring much then. Bytes from 64 columns to the next, and from eight tokens to the next.
  static constexpr int kColumnStride = kGathered ? kSubTileBytes : kAtomBytes, kTokenStride = kGathered ? kAtomBytes : kHalf * kAtomBytes;
  // Where columns 64 t .. 64 t + 63 begin. Rope lies in a sub-tile.
  static __host__ __device__ constexpr int columns(int t) { return t / kHalf * kHalf * kSubTileBytes + t % kHalf * kColumnStride; }
};

constexpr int kShortPiece = 32;  // blocks, some 50 us: a last piece behind which combine is launched early
enum NamedBarrier {
  kStart = 1,
  kProducersReady,
  kP0Ready,
  kP1Ready = kP0Ready + 2,
  kTurn1 = kP1Ready + 2,
  kRowSums,
  kStored,
  kLargestRead,
  kWarpgroup0,
  kWarpgroup1,
  kLastTurn1
};

// Where a gathering warp is in its part: the first block of a sequence behind the list that it is in, and the entries of the sequence's two lists.
struct alignas(16) Walk {
  int seq, block, end, entries[2];
};

template <class Tr>
struct alignas(1024) Storage {
  using SubTile = typename Tr::T[64 * 64];
  SubTile k[2][Tr::kSlotTiles];
  SubTile q[2 * Tr::kHalf];
  SubTile p[2];
  float reference[2][64];       // the reference maximum each warpgroup's P was taken against
  float row_sum[2][2][64];      // [parity of the work item][warpgroup]
  typename Tr::Valid valid[2];  // of the block in a slot
  Walk walk[4];
  Part part;
  Work work;                                    // the piece whose Q is in shared memory
  int next_blocks;                              // of the piece behind it
  int row_index[Tr::kGathered ? 1 : kRowTile];  // Cta::index_of, which divides
  const void* rows[2][Tr::kAsked ? 64 : 1];     // where the codes of a slot's next block are
  Barrier k_full[2][Tr::kFullBarriers], k_empty[2][2], q_full, q_empty;
  Barrier k_rows[2], k_staged[2][4];  // rows[] is there; a gathering warp's codes are
  Barrier announced;                  // announce_partials is done
};
static_assert(sizeof(Storage<Traits<__half, 576, Keys::kPaged>>) <= 232448 && sizeof(Storage<Traits<__half, 576, Keys::kCopied, true>>) <= 232448 &&
                  sizeof(Storage<Traits<__half, 576, Keys::kConverted, true>>) <= 232448,
              "the shared memory of an sm_90 CTA");

// S = Q.K of slot kWg, in the order in which the sub-tiles are let go of, and arrive: left half, right half, rope.
template <class Tr, int kWg>
__device__ __forceinline__ void scores(float (&s)[32], Storage<Tr>& smem, const uint32_t (&q_rope)[16], uint32_t phase) {
  using A = Atoms<typename Tr::T>;
  const uint64_t q = smem_desc(smem.q), k = smem_desc(smem.k[kWg], 16, Tr::kTokenStride);
  // Scores read all that shared memory can give, and stores get through where they leave room: products that begin before all is stored hinder the rest.
  if (Tr::kConverted) {
#pragma unroll
    for (int i = 0; i < Tr::kFullBarriers; ++i) barrier_wait(smem.k_full[kWg][i], phase);
    fence_async_proxy();
  }
  int waited = -1;
  pin(s);
  wgmma_fence();
#pragma unroll
  for (int t = 0; t < Tr::kSubTiles; ++t) {
    const bool rope = Tr::kRope && t == Tr::kSubTiles - 1;
    if (Tr::barrier_of(t) != waited) {
      waited = Tr::barrier_of(t);
      barrier_wait(smem.k_full[kWg][waited], phase);
      if (Tr::kGathered && !Tr::kConverted) fence_async_proxy();  // for the threads that stored the keys: with it they would wait for their loads, too
    }
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t b = k + (Tr::columns(t) >> 4) + 2 * step - (rope ? uint64_t((Tr::kTokenStride - kAtomBytes) >> 4) << 32 : 0);
      if (rope)
        mma<typename A::QkRS>(s, q_rope + 4 * step, b);
      else
        mma<typename A::QkSS>(s, q + t * (kSubTileBytes >> 4) + 2 * step, b, t + step > 0);
    }
  }
  wgmma_commit();
}

// O half kWg (kept, or started from zero) += P.V over tokens 32 kPart .. 32 kPart + 31 of slot `slot`; P in registers or in shared memory.
template <class Tr, int kWg, int kPart, class P, bool kIdle = kPart == 0>
__device__ __forceinline__ void accumulate(float (&o)[128], const P& p, Storage<Tr>& smem, int slot, bool keep = true) {
  using A = Atoms<typename Tr::T>;
  const uint64_t v = smem_desc(smem.k[slot][kWg * Tr::kHalf], Tr::kColumnStride, Tr::kTokenStride);
  if (kIdle) pin(o);  // no earlier product on o is in flight
  wgmma_fence();
#pragma unroll
  for (int step = 2 * kPart; step < 2 * (kPart + 1); ++step) {
    if constexpr (std::is_integral_v<P>)
      mma<typename A::PvSS>(o, p + 2 * step, v + 2 * (Tr::kTokenStride >> 4) * step, keep || step > 0);
    else
      mma<typename A::PvRS>(o, p + 4 * step, v + 2 * (Tr::kTokenStride >> 4) * step, keep || step > 0);
  }
  wgmma_commit();
}

// Zeros in rows first_row .. 63 of V.
template <class Tr>
__device__ __forceinline__ void clear_rows(typename Storage<Tr>::SubTile (&k)[Tr::kSlotTiles], int first_row, int thread) {
  for (int i = first_row * 8 + thread; i < kBlockTokens * 8; i += kWarpgroup)
#pragma unroll
    for (int t = 0; t < 2 * Tr::kHalf; ++t) {
      char* atom = reinterpret_cast<char*>(k) + Tr::columns(t) + i / 64 * Tr::kTokenStride;
      reinterpret_cast<uint4*>(atom)[i % 64] = make_uint4(0, 0, 0, 0);
    }
}

// This thread's share of the rope part of Q: the A operand of the rope product.
__device__ __forceinline__ void load_rope(uint32_t (&q_rope)[16], const Cta& cta, int seq, int index0, int index1, int lane) {
  const auto* q = static_cast<const uint16_t*>(cta.p.q) + cta.first_index(seq) * cta.p.d_qk + kDv;
  load_fragment(q_rope, index0 < 0 ? nullptr : q + int64_t(index0) * cta.p.d_qk, index1 < 0 ? nullptr : q + int64_t(index1) * cta.p.d_qk, lane);
}

// Marks the partial results of this CTA as absent (partial.cuh), of which only a part's first and last piece have any. By warpgroup 1, whose scores come
// second.
__device__ __forceinline__ void announce_partials(const DecodeParams& p, const Cta& cta, int warp, int lane) {
  const int row = cta.row0() + kFragmentRows * warp;
  for (int at = cta.part.begin_seq; at <= cta.last_seq(); at = max(at + 1, cta.last_seq())) {
    const int slot = cta.slot(at, cta.sequence(at));
    if (slot < 0 || slot >= p.slots || row >= p.rows) continue;
    const uint4 absent = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
    uint4* out = partial_fragments(p, slot, cta.kv_head(), row / kFragmentRows);
#pragma unroll
    for (int i = 0; i < kRowFragments * kFragmentLanes / kLineUnits / 32; ++i) store_relaxed(out + (32 * i + lane) * kLineUnits + kLineUnits - 1, absent);
    if (lane < kFragmentRows && row + lane < p.rows) store_relaxed(reinterpret_cast<uint4*>(partial_stats(p, slot, cta.kv_head(), row + lane)), absent);
  }
}

template <class Tr, class Params>
__device__ __forceinline__ void compute(const Params& p, Storage<Tr>& smem, int wg, int warp, int lane) {
  using T = typename Tr::T;
  cutlass::arch::warpgroup_reg_alloc<Tr::kComputeRegisters>();
  const Cta cta{p, smem.part};
  if (!Tr::kGathered && threadIdx.x < kRowTile) smem.row_index[threadIdx.x] = cta.index_of(threadIdx.x);
  const int tile_row[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  // Rows of gathered keys are the heads of one token, in order.
  auto index_of = [&](int row) { return !Tr::kGathered ? cta.index_of(row) : cta.row0() + row < p.rows ? cta.row0() + row : -1; };
  auto token_of = [&](int row) { return Tr::kGathered ? 0 : cta.token_of(row); };
  const int own_index[2] = {index_of(tile_row[0]), index_of(tile_row[1])};
  auto index = [&](int r) { return Tr::kGathered ? index_of(16 * warp + lane_again() / 4 + 8 * r) : own_index[r]; };  // not through the main loop in registers
  const int token[2] = {token_of(tile_row[0]), token_of(tile_row[1])}, first_token = token_of(0);
  wait_for_predecessor();
  named_sync(kStart, kThreads);  // the part is there
  // A scale of zero (a plain mean) would turn the masked -inf into NaN; this is as good as zero.
  const float scale_log2 = fmaxf(p.softmax_scale, 1e-30f) * kLog2E;
  uint32_t k_phase = 0, q_phase = 0;
  float o[128], s[32], reference[2], sum[2], factor[2], largest[2];
  uint32_t probs[16], q_rope[16];

  using Wg0 = std::integral_constant<int, 0>;
  using Wg1 = std::integral_constant<int, 1>;
  using First = std::integral_constant<int, 0>;  // of the two parts of a block, 32 tokens each
  using Second = std::integral_constant<int, 1>;

  auto arrive = [&](Barrier& bar) {
    __syncwarp();  // an arrival releases the arriving thread's accesses only
    if (lane == 0) barrier_arrive(bar);
  };
  // Asks for the codes of the next block of slot s, sixteen tokens a warp, where this warpgroup has the time: the left half of the slot, in which they wait for
  // their conversion, is free by then. A copy takes 40 clocks to ask for, and those who convert are always late.
  uint32_t ask_phase = 0;
  auto ask = [&](int s) {
    if constexpr (Tr::kAsked) {
      barrier_wait(smem.k_rows[s], ask_phase);
      barrier_wait(smem.k_empty[s][0], ask_phase ^ 1);
      ask_phase ^= 1;
      if (elect()) {
        Barrier& staged = smem.k_staged[s][warp];
        barrier_expect(staged, 16 * Tr::kCodes);
        const uint32_t to = smem_address(smem.k[s][warp]);
#pragma unroll 4
        for (int i = 0; i < 16; ++i) copy_bulk(to + i * (kSubTileBytes / 16), smem.rows[s][16 * warp + i], Tr::kCodes, staged);
      }
      __syncwarp();
    }
  };
  if (!Tr::kGathered && wg == 1) {
    announce_partials(p, cta, warp, lane);
    arrive(smem.announced);
  }
  auto leave = [](auto* to, const auto& x) {  // for combine
    if constexpr (Tr::kGathered)
      *to = x;
    else
      store_relaxed(to, x);
  };
  auto rescale = [&] {
    pin(o);
    scale_rows(o, factor);
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] *= factor[r];
  };

  auto find_maxima = [&](float (&top)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = row_maximum(s, r);
      if (Tr::kPrefill) largest[r] = fmaxf(largest[r], top[r]);
    }
  };
  if (Tr::kAsked && cta.part.begin_seq <= cta.last_seq() && cta.work(cta.part.begin_seq).blocks() > wg) ask(wg);
  if (Tr::kRope && cta.part.begin_seq <= cta.last_seq()) load_rope(q_rope, cta, cta.part.begin_seq, index(0), index(1), lane);
  for (int at = cta.part.begin_seq; at <= cta.last_seq(); ++at) {
    barrier_wait(smem.q_full, q_phase);
    q_phase ^= 1;
    const Work w = smem.work;
    const int seq = Tr::kGathered ? at : w.seq;
    const int next_blocks = Tr::kAsked ? smem.next_blocks : 0;
    // Combine takes an SM when it is free, and waits there for the end of this kernel: early, where launching it would show. Never before this kernel's own
    // wait: combine reads the plan at once. In dense decode a producer sees to it.
    if (Tr::kGathered && at == cta.last_seq() && w.end - w.begin <= kShortPiece) let_successor_start();
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = largest[r] = -INFINITY, sum[r] = 0.f;
    const int limit[2] = {cta.keys_of(w.len, token[0]), cta.keys_of(w.len, token[1])};
    const int all_see = cta.keys_of(w.len, first_token);  // tokens before this one are seen by every row of the tile

    // Q is no longer needed: lets the producer copy the next sequence's, and fetches the next rope part behind what is left of this piece.
    auto release_q = [&] {
      arrive(smem.q_empty);
      if (Tr::kRope && at < cta.last_seq()) load_rope(q_rope, cta, Tr::kGathered ? at + 1 : cta.sequence(at + 1), index(0), index(1), lane);
    };
    auto mask = [&](int block, typename Tr::Valid valid) {
      if constexpr (Tr::kGathered) {
        if (valid != ~uint64_t(0)) mask_scores(s, valid);
      } else {
        if ((block + 1) * kBlockTokens > all_see || valid != 0xF) mask_scores(s, block * kBlockTokens, limit, valid);
      }
    };
    // What follows is compiled once per warpgroup, so that its barriers have fixed numbers.
    // Slots past the end of the sequence may hold anything, and 0 x NaN is NaN: clears their rows of V, before either warpgroup multiplies with them.
    auto clear_tail = [&](auto wg_constant, int block) {
      constexpr int kWg = decltype(wg_constant)::value;
      const int tail = w.len - block * kBlockTokens;
      if (Tr::kGathered || tail >= kBlockTokens) return;
      named_sync(kWarpgroup0 + kWg, kWarpgroup);  // every warp's scores are through with the keys
      clear_rows<Tr>(smem.k[kWg], tail, threadIdx.x % kWarpgroup);
      fence_async_proxy();
      named_sync(kWarpgroup0 + kWg, kWarpgroup);  // our own product reads every thread's zeros
    };
    // Hands half of this warpgroup's probabilities, and with the first half the reference, to the other one. The last ones have been read by then:
    // warpgroup 1 is through with P0 before it publishes the second half of P1, which warpgroup 0 waits for, and warpgroup 0 with P1 before it publishes
    // the next P0; between pieces both meet at the row sums.
    auto publish = [&](auto wg_constant, auto part_constant) {
      constexpr int kWg = decltype(wg_constant)::value, kPart = decltype(part_constant)::value;
#pragma unroll
      for (int k = 2 * kPart; k < 2 * (kPart + 1); ++k) store_fragment(smem.p[kWg], warp, lane, k, probs + 4 * k);
      if (kPart == 0 && (lane & 3) == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) smem.reference[kWg][tile_row[r]] = reference[r];
      }
      fence_async_proxy();
      named_arrive((kWg == 0 ? kP0Ready : kP1Ready) + kPart, kComputeThreads);
    };
    // Follows the reference that the other warpgroup published. Uniform over the warp: true when a row's differs, and then the output needs rescaling.
    auto adopt_reference = [&](auto wg_constant) -> bool {
      constexpr int kWg = decltype(wg_constant)::value;
      float theirs[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) theirs[r] = smem.reference[1 - kWg][tile_row[r]];
      if (!__any_sync(~0u, theirs[0] != reference[0] || theirs[1] != reference[1])) return false;
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] = rescale_factor(reference[r], theirs[r]), reference[r] = theirs[r];
      return true;
    };

    // A step is block `block` of warpgroup 0 and, when there is one (kPair), block + 1 of warpgroup 1. It is compiled for both cases, because ptxas gives
    // up on overlapping products across branches. What makes it quick is that the warpgroups stay half a step apart, one in its softmax while the other
    // multiplies: warpgroup 1's scores wait for warpgroup 0's, its softmax for warpgroup 0's probabilities, and slot 0 is let go of as soon as its last
    // reader is through, so that it is full again half a step before slot 1.
    // A turn is over when its last product is issued: those of the other warpgroup queue behind it, and the tensor cores do not run dry while the message is
    // on its way. For the same reason warpgroup 1's last product waits for warpgroup 0's, behind which the next pair begins.
    auto step0 = [&](int block, auto pair_constant) {
      constexpr bool kPair = decltype(pair_constant)::value;
      scores<Tr, 0>(s, smem, q_rope, k_phase);
      const typename Tr::Valid valid = smem.valid[0];
      k_phase ^= 1;
      if constexpr (kPair) named_arrive(kTurn1, kComputeThreads);
      wgmma_wait<0>();
      pin(s);
      if (block + 2 >= w.end) release_q();
      mask(block, valid);
      float top[2];
      find_maxima(top);
      if (update_reference(top, scale_log2, reference, factor)) rescale();
      clear_tail(Wg0{}, block);
      probabilities<T, 0>(s, scale_log2, reference, sum, probs);
      publish(Wg0{}, First{});
      accumulate<Tr, 0, 0>(o, probs, smem, 0, block > w.begin);
      probabilities<T, 1>(s, scale_log2, reference, sum, probs);
      publish(Wg0{}, Second{});
      accumulate<Tr, 0, 1>(o, probs, smem, 0);
      wgmma_wait<0>();
      pin(o);
      arrive(smem.k_empty[0][0]);
      if constexpr (kPair) {
        if (Tr::kAsked && block + 2 < w.end) ask(0);
        named_sync(kP1Ready, kComputeThreads);
        if (adopt_reference(Wg0{})) rescale();
        accumulate<Tr, 0, 0>(o, smem_desc(smem.p[1]), smem, 1);
        named_sync(kP1Ready + 1, kComputeThreads);
        accumulate<Tr, 0, 1>(o, smem_desc(smem.p[1]), smem, 1);
        named_arrive(kLastTurn1, kComputeThreads);
        wgmma_wait<0>();
        pin(o);
        arrive(smem.k_empty[1][0]);
      }
    };
    auto step1 = [&](int block, auto pair_constant) {
      constexpr bool kPair = decltype(pair_constant)::value;
      typename Tr::Valid valid = 0;
      float top[2];
      if constexpr (kPair) {
        named_sync(kTurn1, kComputeThreads);
        scores<Tr, 1>(s, smem, q_rope, k_phase);
        valid = smem.valid[1];
        k_phase ^= 1;
      }
      auto take_scores = [&] {
        pin(s);
        if (block + 2 >= w.end) release_q();
        mask(block + 1, valid);
        find_maxima(top);
      };
      // Before P0's products, whose issue blocks: P0 comes no sooner, because its stores get through when these scores have read their last. Where stores of
      // keys get in between, scores take longer, and products of P0 go first.
      if constexpr (kPair && !Tr::kGathered) {
        wgmma_wait<0>();
        take_scores();
      }
      named_sync(kP0Ready, kComputeThreads);
      if (adopt_reference(Wg1{})) {
        if constexpr (kPair && Tr::kGathered) wgmma_wait<0>();  // without it ptxas puts one here, and complains
        rescale();
      }
      accumulate<Tr, 1, 0>(o, smem_desc(smem.p[0]), smem, 0, block > w.begin);
      named_sync(kP0Ready + 1, kComputeThreads);
      accumulate<Tr, 1, 1>(o, smem_desc(smem.p[0]), smem, 0);
      if constexpr (kPair) {
        if constexpr (Tr::kGathered) {
          wgmma_wait<2>();
          take_scores();
        }
        if (update_reference(top, scale_log2, reference, factor)) {
          wgmma_wait<0>();
          rescale();
        }
        clear_tail(Wg1{}, block + 1);
        probabilities<T, 0>(s, scale_log2, reference, sum, probs);
        publish(Wg1{}, First{});
        accumulate<Tr, 1, 0, uint32_t[16], false>(o, probs, smem, 1);
        wgmma_wait<1>();
        arrive(smem.k_empty[0][1]);
        probabilities<T, 1>(s, scale_log2, reference, sum, probs);
        publish(Wg1{}, Second{});
        named_sync(kLastTurn1, kComputeThreads);
        accumulate<Tr, 1, 1>(o, probs, smem, 1);
        wgmma_wait<0>();
        pin(o);
        arrive(smem.k_empty[1][1]);
        if (Tr::kAsked && block + 3 < w.end) ask(1);
      } else {
        release_q();
        wgmma_wait<0>();
        pin(o);
        arrive(smem.k_empty[0][1]);
      }
    };
    int block = w.begin;
    if (w.begin >= w.end) {  // no key: the output is zero, and the registers still hold the last piece's
      release_q();
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] = 0.f;
    } else if (wg == 0) {
      for (; block + 1 < w.end; block += 2) step0(block, std::true_type{});
      if (block < w.end) step0(block, std::false_type{});
    } else {
      for (; block + 1 < w.end; block += 2) step1(block, std::true_type{});
      if (block < w.end) step1(block, std::false_type{});
    }

    if (Tr::kAsked && wg == 0 && next_blocks > 0) ask(0);
    if (Tr::kGathered && at == cta.last_seq()) let_successor_start();
    // Both warpgroups hold the same reference; each summed its own blocks.
    auto& row_sum = smem.row_sum[q_phase];  // double-buffered: the other warpgroup may still be reading the last piece's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      if ((lane & 3) == 0) row_sum[wg][tile_row[r]] = sum[r];
    }
    if constexpr (Tr::kPrefill) {  // warpgroup 0 gives its largest scores where only it reads, when the last piece's have been read
      if (wg == 0 && at > cta.part.begin_seq) named_sync(kLargestRead, kComputeThreads);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest[r] = quad_max(largest[r]);
        if (wg == 0 && (lane & 3) == 0) smem.reference[1][tile_row[r]] = largest[r];
      }
    }
    named_sync(kRowSums, kComputeThreads);
    // Gathered keys come in short pieces, whose ends show. There warpgroup 0 is in a hurry, because it computes the first scores of the next piece: warpgroup
    // 1 writes lse, and stores behind it, which takes a thousand clocks each. The same costs dense decode 2 % where products are its limit.
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = index(r);
      const float total = row_sum[0][tile_row[r]] + row_sum[1][tile_row[r]];
      const bool any = total != 0.f;                                                       // a row without a key: output 0, lse -inf; NaN goes through
      const float lse = reference[r] + (Tr::kGathered ? log2_fast(total) : log2f(total));  // base 2
      inverse[r] = any ? (Tr::kGathered ? reciprocal_fast(total) : 1.f / total) : 0.f;
      if (kSparse<Params> && any && own >= 0) inverse[r] *= sink_factor(p, seq, own, lse);  // one token, so a row is a head
      if (own >= 0 && wg == (Tr::kGathered ? 1 : 0) && (lane & 3) == 0) {
        if (w.slot < 0)
          p.lse[lse_index(p, seq, own - token[r] * p.h_q, token[r])] = any ? lse * kLn2 : -INFINITY;
        else if (w.slot < p.slots)
          leave(reinterpret_cast<float2*>(partial_stats(p, w.slot, cta.kv_head(), cta.row0() + tile_row[r])), make_float2(reference[r], total));
        if constexpr (Tr::kPrefill) {
          const float logit = fmaxf(largest[r], smem.reference[1][tile_row[r]]) * scale_log2 * kLn2;
          if (w.slot < p.slots) (w.slot < 0 ? p.max_logits + int64_t(seq) * p.h_q : p.partial_max + int64_t(w.slot) * p.h_q)[own] = logit;
        }
      }
    }
    if (Tr::kPrefill && wg == 1 && at < cta.last_seq()) named_arrive(kLargestRead, kComputeThreads);
    if (w.slot < 0) {  // through P, which is free: both warpgroups are through with their last products
      if (Tr::kGathered && wg == 1) named_sync(kStored, kComputeThreads);
      T* out = static_cast<T*>(p.out) + cta.first_index(seq) * kDv + wg * (kDv / 2);
      store_rows(out, kDv, smem.p[wg], warp, o, inverse, [&](int i) { return Tr::kGathered ? index_of(16 * warp + i) : smem.row_index[16 * warp + i]; });
      if (Tr::kGathered && wg == 0) named_arrive(kStored, kComputeThreads);
    } else if (w.slot < p.slots && cta.row0() + 16 * warp < p.rows) {
      float scale[2];
      partial_scales(o, scale);
      const int own = lane_again(), row = cta.row0() + 16 * warp + own / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        inverse[r] = reciprocal_fast(scale[r]);
        if (Tr::kGathered && row + 8 * r < p.rows && (own & 3) == 0) leave(&partial_stats(p, w.slot, cta.kv_head(), row + 8 * r)->scale[wg], scale[r]);
      }
      uint4* out = partial_fragments(p, w.slot, cta.kv_head(), cta.row0() / kFragmentRows + warp) + wg * (kRowFragments / 2 * kFragmentLanes) + own;
#pragma unroll
      for (int i = 0; i < kRowFragments / 2; ++i) leave(out + i * kFragmentLanes, pack_partial(o + 8 * i, inverse));
      // Where they are handed over these come last, because they are what combine looks at first.
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (!Tr::kGathered && row + 8 * r < p.rows && (own & 3) == 0) leave(&partial_stats(p, w.slot, cta.kv_head(), row + 8 * r)->scale[wg], scale[r]);
    }
    if (Tr::kAsked && wg == 1 && next_blocks > 1) ask(1);  // not earlier: its rows come behind the codes of the block before
  }
}

}  // namespace jax_flashmla::seesaw
