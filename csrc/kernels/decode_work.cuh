// What a CTA of a decode kernel works on: its part of the schedule, the pieces in it, and its queries.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hopper/barrier.cuh"
#include "hopper/launch.cuh"
#include "hopper/tma.cuh"
#include "params.h"

namespace jax_flashmla {

// A piece of one sequence: KV blocks [begin, end), seen by this row tile.
struct Work {
  int seq, len, begin, end;
  int slot;  // of the partial result; -1: the sequence is not split, write the output itself

  __device__ int blocks() const { return max(end - begin, 0); }
};

// The part of the schedule of this CTA. Metadata come from the device and may be anything: no sequence outside of [0, b) survives. early: read_early.
template <bool kLists = false>
__device__ __forceinline__ Part load_part(const DecodeParams& p, bool early = false) {
  Part part = early ? read_early(p.metadata[blockIdx.z]) : p.metadata[blockIdx.z];
  part.begin_seq = max(part.begin_seq, 0);
  if (kLists && part.begin_split < 0) {
    const bool good = part.begin_seq < p.b && static_cast<unsigned>(part.end_seq - part.begin_seq) <= kMostListed;
    part.begin_block = part.end_block = 0, part.end_seq = good ? part.end_seq : part.begin_seq;
#pragma unroll
    for (int& seq : part.next) seq = min(max(seq, 0), p.b - 1);
    return part;
  }
  if (static_cast<unsigned>(part.end_seq) >= static_cast<unsigned>(p.b)) part.end_seq = min(max(part.end_seq, 0), p.b), part.end_block = 0;
  return part;
}

// What a CTA is: its row tile, KV head and part.
struct Cta {
  const DecodeParams& p;
  const Part& part;
  int last_token = token_of(kRowTile - 1);  // made early: a division

  __device__ int row0() const { return blockIdx.x * kRowTile; }
  __device__ int kv_head() const { return blockIdx.y; }
  __device__ int last_seq() const { return part.end_block > 0 ? part.end_seq : part.end_seq - 1; }

  __device__ int token_of(int tile_row) const { return (row0() + tile_row) / p.group; }
  // Where a row of the tile lies among the s_q x h_q rows of its sequence, in q and out alike; -1 past the end.
  __device__ int index_of(int tile_row) const {
    const int row = row0() + tile_row;
    return row < p.rows ? row / p.group * p.h_q + kv_head() * p.group + row % p.group : -1;
  }
  __device__ int64_t first_index(int seq) const { return int64_t(seq) * p.s_q * p.h_q; }

  // Number of keys that query token `token` sees.
  __device__ int keys_of(int len, int token) const { return p.causal ? min(len, len - p.s_q + token + 1) : len; }

  // The sequence of a piece: `at` counts from part.begin_seq to last_seq(), which are numbers of sequences where the part is no list.
  __device__ int sequence(int at) const {
    const int i = at - part.begin_seq;
    return part.begin_split >= 0 || i == 0 ? at : i == 1 ? part.next[0] : i == 2 ? part.next[1] : part.next[2];
  }

  // Where the piece begins unless the sequence ends before: known before its length is. A made-up begin_block must not overflow the token count.
  __device__ int first_block(int at) const { return at == part.begin_seq ? min(max(part.begin_block, 0), p.max_len / kBlockTokens) : 0; }

  __device__ Work work(int at) const { return work(at, at); }
  __device__ Work work(int at, int seq) const {
    Work w{seq, p.cache_seqlens ? min(max(p.cache_seqlens[seq], 0), p.max_len) : p.max_len};
    const int keys = max(keys_of(w.len, last_token), 0);
    const int blocks = (keys + kBlockTokens - 1) / kBlockTokens;
    w.end = at == part.end_seq ? min(part.end_block, blocks) : blocks;
    w.begin = min(first_block(at), max(w.end, 0));
    w.slot = slot(at, seq);
    return w;
  }
  __device__ int slot(int at, int seq) const {
    const int first = p.num_splits ? p.num_splits[seq] : 0, partials = p.num_splits ? p.num_splits[seq + 1] - first : 0;
    return partials > 0 ? first + (at == part.begin_seq ? part.begin_split : 0) : -1;
  }
};

// Rows of one KV head that lie one after the other in q: all of a sequence's where there is one head, else some of a token's.
__host__ __device__ inline int q_box_rows(const DecodeParams& p) {
  int rows = kRowTile;
  while (p.h_kv > 1 && p.group % rows != 0) rows /= 2;
  return rows;
}

// kTiles sub-tiles of the tile's rows of Q, from t on. Rows past the end of the sequence lie outside of the map and become zeros.
template <int kTiles, class T>
__device__ __forceinline__ void load_q(const CUtensorMap& q_map, Barrier& full, T* dst, const Cta& cta, int seq, int t) {
  if (cta.p.h_kv == 1) return tma_load(q_map, full, dst, 0, cta.row0(), t, 0, seq);
  const int box = q_box_rows(cta.p);
  for (int i = 0; i < kTiles * kRowTile; i += box) {
    const int row = cta.row0() + i % kRowTile, token = row / cta.p.group;
    tma_load(q_map, full, dst + i * 64, 0, row - token * cta.p.group, t + i / kRowTile, cta.kv_head(), seq * cta.p.s_q + token);
  }
}

// A map over 16-bit elements, 64 of which a box has in the first dimension; stride[i] is that of dimension i + 1, in elements.
template <class T, int kRank>
Status encode_map(CUtensorMap& map, const void* base, const cuuint64_t (&size)[kRank], const int64_t (&stride)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  const auto encode = tensor_map_encoder();
  if (!encode) return "decode: the CUDA driver offers no cuTensorMapEncodeTiled; a driver for CUDA 12 or newer is needed";
  cuuint64_t bytes[kRank - 1];
  cuuint32_t step[kRank];
  for (int i = 0; i < kRank; ++i) step[i] = 1;
  for (int i = 0; i + 1 < kRank; ++i) bytes[i] = cuuint64_t(stride[i]) * sizeof(T);
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // L2 fetches lines of 128 bytes, a row of a sub-tile: in pairs they cost 5 % of the bandwidth.
  const CUresult err = encode(&map, type, kRank, const_cast<void*>(base), size, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return err == CUDA_SUCCESS ? nullptr : "decode: the CUDA driver refused a tensor map of q or k_cache";
}

// The map of q: [sequence and token, KV head, sub-tile, row of the head, 64] in boxes of some rows, or with one KV head [sequence, 1, sub-tile, row, 64] in
// boxes of the tile's rows and kTiles sub-tiles, one behind the other as in shared memory.
template <int kTiles, class T>
Status encode_q_map(CUtensorMap& q_map, const DecodeParams& p) {
  const bool one = p.h_kv == 1;
  const int64_t d = p.d_qk, rows = one ? p.rows : p.group, all = int64_t(p.b) * p.s_q * p.h_q;
  return encode_map<T, 5>(q_map, p.q, {64, cuuint64_t(rows), cuuint64_t(d / 64), cuuint64_t(p.h_kv), cuuint64_t(all / (rows * p.h_kv))},
                          {d, 64, rows * d, rows * p.h_kv * d}, {64, cuuint32_t(q_box_rows(p)), one ? kTiles : 1u, 1, 1});
}

}  // namespace jax_flashmla
