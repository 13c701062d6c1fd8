// What the FFI handlers hand to the kernels: pointers, sizes and a stream. No XLA, no CUTLASS, no CUDA headers, so that any C++ caller can launch a
// kernel from this file alone. The letters are those of docs/api.md: b, s_q, h_q, h_kv, d_qk, d_v, page_size, max_pages.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t without the CUDA headers

namespace jax_flashmla {

using Stream = CUstream_st*;
using Status = const char*;  // nullptr: launched; else a sentence with static lifetime

inline constexpr int kBlockTokens = 64;  // KV tokens in a block, the unit of the schedule
inline constexpr int kRowTile = 64;      // packed query rows (token x head of the group) in one CTA
inline constexpr int kDv = 512;
inline constexpr int kMetadataWidth = 8;

// One row of tile_scheduler_metadata: the KV blocks that part works on, from (begin_seq, begin_block) up to, not including, (end_seq, end_block).
// Its first piece is split `begin_split` of its sequence; every later piece starts a sequence.
struct alignas(16) Part {
  int begin_seq, begin_block, end_seq, end_block, begin_split, unused[3];
};
static_assert(sizeof(Part) == kMetadataWidth * sizeof(int));

struct ScheduleParams {
  const int* cache_seqlens;  // [n, b]
  Part* metadata;            // [n, num_parts]
  int* num_splits;           // [n, b + 1]
  int n, b, num_parts;
  bool batch_invariant;
  Stream stream;
};

enum class Dtype { kBF16, kF16 };

struct DenseDecodeParams {
  const void* q;                       // [b, s_q, h_q, d_qk]
  const void* k_cache;                 // [num_pages, page_size, h_kv, d_qk]
  const int* block_table;              // [b, max_pages]
  const int* cache_seqlens;            // [b]
  const Part* metadata;                // [num_parts]
  const int* num_splits;               // [b + 1], exclusive prefix sum of the number of partial results of each sequence
  void* out;                           // [b, s_q, h_q, d_v]
  float* lse;                          // [b, h_q, s_q], natural logarithm
  float* partial_out;                  // [slots, h_kv, rows rounded up to 16, d_v], in the order of splitkv/partial.cuh
  float* partial_stats;                // [slots, h_kv, rows, 2], reference maximum (base 2) and sum
  int b, s_q, h_q, h_kv, group, rows;  // group = h_q / h_kv query heads share a KV head; rows = s_q * group; row r is token r / group, head r % group
  int d_qk, num_pages, page_size, max_pages, max_len;  // max_len = max_pages * page_size, capped to int
  int num_parts, slots;
  float softmax_scale;
  bool causal;
  Dtype dtype;
  Stream stream;
};

}  // namespace jax_flashmla
