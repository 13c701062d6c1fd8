// Reads whole sequences out of a pool, one behind the other, as bfloat16 where the pool is fp8. The numbers are those of jax_flashmla/kvcache/rows.py.
//
// A warp has two consecutive rows of the result. It finds their tokens by a prefix sum over the lengths, 128 sequences at a time, that ends where its rows do,
// and moves both at once, in chunks as in append.cu. One launch, no workspace, and no warp waits for another.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "attention/fp8.cuh"
#include "attention/pack.cuh"
#include "hopper/convert.cuh"
#include "hopper/gather.cuh"
#include "hopper/launch.cuh"
#include "hopper/scatter.cuh"
#include "hopper/warp.cuh"
#include "kernels/gather.h"
#include "kernels/rows.cuh"

namespace jax_flashmla {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 2;  // of a warp: finding them costs two accesses one after the other, whatever their number

// CTAs that share the rows of a plan.
__host__ __device__ constexpr int ctas_of(int total) { return (total - 1) / (kWarps * kRows) + 1; }

struct Token {
  int page, offset;  // page -1: none
};

// The tokens of rows first and first + 1, in all lanes. Sums stop at the number of rows: lengths are anything, and so are their sums.
__device__ __forceinline__ void find_tokens(const GatherParams& p, int plan, int first, Token (&tokens)[kRows]) {
  constexpr int kOwn = 4;  // sequences of a lane at once
  const int lane = threadIdx.x & 31;
  const int* lengths = p.cache_seqlens + int64_t(plan) * p.b;
  const int64_t room = int64_t(p.max_pages) * p.pool.page_size;
  const unsigned total = unsigned(p.total);
  const int longest = int(room < p.total ? room : p.total);
  auto plus = [&](unsigned a, unsigned b) { return min(a + b, total); };
#pragma unroll
  for (Token& token : tokens) token = {-1, 0};
  unsigned before = 0;  // rows of the sequences below base
#pragma unroll 1
  for (int base = 0; base < p.b && before < unsigned(first + kRows); base += 32 * kOwn) {
    const int seq0 = base + kOwn * lane;
    int length[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) length[i] = seq0 + i < p.b ? lengths[seq0 + i] : 0;
    unsigned own = 0;
#pragma unroll
    for (int& x : length) x = min(max(x, 0), longest), own = plus(own, unsigned(x));
    const unsigned through = warp_scan(own, plus), below = __shfl_up_sync(~0u, through, 1), start = before + (lane ? below : 0);
    int page[kRows], offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned row = unsigned(first + r);
      page[r] = -1, offset[r] = int(row - start);
      if (row < total && row >= start && row - start < own) {
        int seq = seq0;
#pragma unroll
        for (int i = 0; i < kOwn - 1; ++i)
          if (seq == seq0 + i && offset[r] >= length[i]) offset[r] -= length[i], ++seq;
        const int column = offset[r] / p.pool.page_size;
        offset[r] -= column * p.pool.page_size;
        page[r] = p.block_table[(int64_t(plan) * p.b + seq) * p.max_pages + column];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned found = __ballot_sync(~0u, page[r] >= 0 && page[r] < p.pool.num_pages);
      const int from = max(__ffs(found) - 1, 0);
      const Token token{__shfl_sync(~0u, page[r], from), __shfl_sync(~0u, offset[r], from)};
      if (found) tokens[r] = token;
    }
    before = plus(before, __shfl_sync(~0u, through, 31));
  }
}

// Eight e4m3 codes times their scale, in float32 and rounded once.
__device__ __forceinline__ uint4 dequantize_chunk(uint2 codes, float scale) {
  auto pair = [&](uint32_t two) {
    const float2 x = from_e4m3x2(two);
    return pack<__nv_bfloat16>(x.x * scale, x.y * scale);
  };
  return make_uint4(pair(codes.x), pair(codes.x >> 16), pair(codes.y), pair(codes.y >> 16));
}

// What a lane has of a row: its chunks as they are in the pool, eight bytes of codes or sixteen of bfloat16 each, and their scales.
template <KVFormat kFormat>
class RowShare {
 public:
  // Asks for all of it; nothing looks at what has come before store() does.
  __device__ __forceinline__ void load(const KVPool& pool, Token token, int lane) {
    const int before_rope = latent_chunks<kFormat>(pool), chunks = row_chunks<kFormat>(pool);
    const Row<kFormat> row(pool, max(token.page, 0), token.offset);
#pragma unroll
    for (int r = 0; r < kRounds<kFormat>; ++r) {
      const int c = lane + 32 * r;
      const bool there = token.page >= 0 && c < chunks, rope = c >= before_rope;
      data_[r] = {}, scale_[r] = 0;
      if constexpr (kFormat == KVFormat::kPlain) {
        if (there) data_[r] = gather16(row.data + 16 * c);
      } else {
        using Layout = Fp8Layout<kFormat>;
        // Rope by halves: pages of an odd number of tokens of fp8_v4 begin on 8 bytes.
        const char* from = row.data + (rope ? Layout::kRope + 16 * (c - before_rope) : 8 * c);
        uint2 low = {}, high = {};
        if (there) low = gather8(from);
        if (there && rope) high = gather8(from + 8);
        data_[r] = make_uint4(low.x, low.y, high.x, high.y);
        const int tile = c / (Layout::kTile / kChunk);
        if (there && !rope) {
          if constexpr (kFormat == KVFormat::kFp8V32)
            scale_[r] = reinterpret_cast<const uint32_t*>(row.scales)[tile];
          else
            scale_[r] = reinterpret_cast<const unsigned char*>(row.scales)[tile];
        }
      }
    }
  }

  // Zeros where there was no token.
  __device__ __forceinline__ void store(const KVPool& pool, char* out, int lane) const {
    const int before_rope = latent_chunks<kFormat>(pool), chunks = row_chunks<kFormat>(pool);
#pragma unroll
    for (int r = 0; r < kRounds<kFormat>; ++r) {
      const int c = lane + 32 * r;
      uint4 v = data_[r];
      if constexpr (kFormat != KVFormat::kPlain) {
        const float scale = kFormat == KVFormat::kFp8V32 ? __uint_as_float(scale_[r]) : e8m0(scale_[r]);
        if (c < before_rope) v = dequantize_chunk(make_uint2(v.x, v.y), scale);
      }
      if (c < chunks) scatter16(out + 16 * c, v);
    }
  }

 private:
  uint4 data_[kRounds<kFormat>];
  uint32_t scale_[kRounds<kFormat>];
};

template <KVFormat kFormat>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  wait_for_predecessor();
  let_successor_start();
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), ctas = ctas_of(p.total);
  const int plan = int(blockIdx.x) / ctas, first = ((int(blockIdx.x) - plan * ctas) * kWarps + warp) * kRows;
  Token tokens[kRows];
  find_tokens(p, plan, first, tokens);

  const int64_t row_bytes = 2 * kChunk * row_chunks<kFormat>(p.pool);
  char* out = static_cast<char*>(p.out) + (int64_t(plan) * p.total + first) * row_bytes;
  RowShare<kFormat> shares[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) shares[r].load(p.pool, tokens[r], lane);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r < p.total) shares[r].store(p.pool, out + r * row_bytes, lane);
}

}  // namespace

Status run_gather(const GatherParams& p) {
  const auto kernel = p.pool.format == KVFormat::kFp8V32  ? gather_kernel<KVFormat::kFp8V32>
                      : p.pool.format == KVFormat::kFp8V4 ? gather_kernel<KVFormat::kFp8V4>
                                                          : gather_kernel<KVFormat::kPlain>;
  if (cudaError_t err = launch(kernel, {unsigned(p.n) * unsigned(ctas_of(p.total)), kThreads}, p.stream, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla
