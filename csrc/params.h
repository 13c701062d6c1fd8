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
// Its first piece is split `begin_split` of its sequence; every later piece starts a sequence. Where begin_split is -1, though, the part lists whole sequences
// in any order: end_seq - begin_seq of them, begin_seq first and then those in `next`. Only dense decode takes such plans.
struct alignas(16) Part {
  int begin_seq, begin_block, end_seq, end_block, begin_split, next[3];
};
inline constexpr int kMostListed = 4;
static_assert(sizeof(Part) == kMetadataWidth * sizeof(int));

struct ScheduleParams {
  const int* cache_seqlens;  // [n, b]
  Part* metadata;            // [n, num_parts]
  int* num_splits;           // [n, b + 1]
  int n, b, num_parts;
  int row_tiles;                // that a sequence's query rows take
  bool batch_invariant, lists;  // lists: parts may list sequences
  Stream stream;
};

enum class Dtype { kBF16, kF16, kF32 };

// What a call of dense decode does: attention and then combine, or one of the two. jax_flashmla/ops/dense_decode.py says when they are calls of their own.
enum class Phase : int { kAll, kAttend, kCombine };

// What all decode kernels have, and all that the compute warpgroups and combine see.
struct DecodeParams {
  const void* q;                       // [b, s_q, h_q, d_qk]
  const int* cache_seqlens;            // [b]; nullptr: all are max_len long
  const Part* metadata;                // [num_parts]
  const int* num_splits;               // [b + 1], exclusive prefix sum of the number of partial results of each sequence; nullptr: there are none
  void* out;                           // [b, s_q, h_q, d_v]
  float* lse;                          // [b, h_q, s_q], natural logarithm
  void* partial_out;                   // [slots, h_kv, rows rounded up to 16, d_v], float16, as splitkv/partial.cuh has it
  void* partial_stats;                 // [slots, h_kv, rows, 4], PartialStats of the same
  int b, s_q, h_q, h_kv, group, rows;  // group = h_q / h_kv query heads share a KV head; rows = s_q * group; row r is token r / group, head r % group
  int d_qk, max_len;                   // lengths are clamped to max_len
  int num_parts, slots;
  float softmax_scale;
  bool causal;
  Dtype dtype;
  Stream stream;
};

struct DenseDecodeParams : DecodeParams {
  const void* k_cache;                  // [num_pages, page_size, h_kv, d_qk]
  const int* block_table;               // [b, max_pages]
  int num_pages, page_size, max_pages;  // max_len = max_pages * page_size, capped to int
};

enum class KVFormat { kPlain, kFp8V32, kFp8V4 };  // plain: rows of the dtype

// Where the bytes of a token of fp8 are: kRow in its row, with kLatent channels that share scales in tiles of kTile, and the roped channels at kRope.
// jax_flashmla/kvcache/formats.py has the same table, and the emulated tests compare them byte for byte.
template <KVFormat kFormat>
struct Fp8Layout;
template <>
struct Fp8Layout<KVFormat::kFp8V32> {
  static constexpr int kLatent = 512, kTile = 128, kRow = 656, kScale = 512, kRope = 528;
};
template <>
struct Fp8Layout<KVFormat::kFp8V4> {  // behind the rows of a page 8 bytes a token: 7 scales and one that is 0; then, perhaps, up to a multiple of kPadding
  static constexpr int kLatent = 448, kTile = 64, kRow = 576, kScaleRow = 8, kRope = 448, kPadding = 576;
};

// A pool, and which of its slots the query tokens attend to.
struct SparseSource {
  const void* cache;       // pages of page_bytes; nullptr: there is no such source
  const int* indices;      // [b, s_q, topk], slots; others than [0, slots) are skipped
  const int* topk_length;  // [b], so many of the topk count; nullptr: all
  int topk, page_size;
  int64_t slots, page_bytes;
};

// To what all decode kernels have, a query token is a sequence: b counts query tokens, s_q and h_kv are 1. Its keys are blocks of 64 of the first source, the
// last one filled up, then those of the second; cache_seqlens counts them so.
struct SparseDecodeParams : DecodeParams {
  SparseSource sources[2];
  const float* attn_sink;  // [h_q], natural logarithm; nullptr: none
  int tokens;              // per sequence of the caller: out is [b / tokens, tokens, h_q, d_v], lse [b / tokens, h_q, tokens]
  KVFormat format;
  bool prefetch = false;  // rows to L2 a block ahead; decode does so with fp8 anyway
};

// A query token and KV head is a sequence here: b counts s_q * heads_kv of them, h_q is the heads of one, and the list is that of the KV head. There is no
// second source, and tokens is 1.
struct SparsePrefillParams : SparseDecodeParams {
  float* max_logits;   // [b, h_q], the largest scaled score
  float* partial_max;  // [slots, h_q], that of a split
  int heads_kv;        // attn_sink is [heads_kv * h_q]
};

// A pool whose rows are written or read one by one: [num_pages] pages of page_bytes, each page_size tokens.
struct KVPool {
  void* data;
  int64_t page_bytes;
  int num_pages, page_size;  // num_pages * page_size fits an int
  int latent;                // channels before the 64 of rope
  KVFormat format;
  Dtype dtype;  // of plain rows
};

struct AppendParams {
  KVPool pool;
  const void* latent;  // [tokens, pool.latent]
  const void* rope;    // [tokens, 64]
  const int* slots;    // [tokens], page * page_size + offset; others than those of the pool are skipped
  int tokens;
  Dtype dtype;  // of latent and rope
  Stream stream;
};

// n independent batches. Rows of sequences stand one behind the other; zeros follow, and stand for tokens of pages that the pool does not have.
struct GatherParams {
  KVPool pool;
  const int* block_table;    // [n, b, max_pages]
  const int* cache_seqlens;  // [n, b]
  void* out;                 // [n, total, pool.latent + 64], bfloat16 or what plain rows are
  int n, b, max_pages, total;
  Stream stream;
};

}  // namespace jax_flashmla
