// Reads whole sequences out of a pool, one behind the other, as bfloat16 where the pool is fp8. The numbers are those of jax_flashmla/kvcache/rows.py.
//
// A CTA has a few consecutive rows of the result. It finds their tokens by a prefix sum over the lengths, 256 sequences at a time, that ends where its last row
// does; then a warp moves a row, in chunks as in append.cu. One launch, and no workspace.
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

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostRows = 32;        // of a CTA: finding tokens costs three accesses one after the other, whatever their number
constexpr int kManyRows = 132 * 64;  // fewer are spread over the SMs, a row a warp

struct Token {
  int page, offset;  // page -1: none
};

// tokens[i] = the token of row first + i, for `rows` rows. All threads must call.
__device__ void find_tokens(const GatherParams& p, int plan, int first, int rows, Token* tokens) {
  __shared__ int64_t sums[kWarps];
  __shared__ int ends[kThreads];  // of sequences base, base + 1, ..., cut off at total
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int* lengths = p.cache_seqlens + int64_t(plan) * p.b;
  const int64_t room = int64_t(p.max_pages) * p.pool.page_size;
  const int longest = int(room < p.total ? room : p.total);
  if (int(threadIdx.x) < rows) tokens[threadIdx.x] = {-1, 0};
  int64_t before = 0;
#pragma unroll 1
  for (int base = 0; base < p.b && before < first + rows; base += kThreads) {
    const int seq = base + int(threadIdx.x);
    const int64_t own = seq < p.b ? min(max(lengths[seq], 0), longest) : 0, inclusive = warp_scan(own);
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    int64_t end = before + inclusive;
    for (int w = 0; w < warp; ++w) end += sums[w];
    ends[threadIdx.x] = int(end < p.total ? end : p.total);
    __syncthreads();
    const int row = first + int(threadIdx.x);
    if (int(threadIdx.x) < rows && row >= before && row < ends[kThreads - 1]) {
      int low = 0, high = kThreads - 1;  // the first sequence that ends behind the row
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > row)
          high = middle;
        else
          low = middle + 1;
      }
      const int position = row - (low ? ends[low - 1] : int(before)), column = position / p.pool.page_size;
      const int page = p.block_table[(int64_t(plan) * p.b + base + low) * p.max_pages + column];
      if (page >= 0 && page < p.pool.num_pages) tokens[threadIdx.x] = {page, position - column * p.pool.page_size};
    }
    before = ends[kThreads - 1];
    __syncthreads();
  }
  __syncthreads();
}

// Eight e4m3 codes times their scale, in float32 and rounded once.
__device__ __forceinline__ uint4 dequantize_chunk(uint2 codes, float scale) {
  auto pair = [&](uint32_t two) {
    const float2 x = from_e4m3x2(two);
    return pack<__nv_bfloat16>(x.x * scale, x.y * scale);
  };
  return make_uint4(pair(codes.x), pair(codes.x >> 16), pair(codes.y), pair(codes.y >> 16));
}

template <KVFormat kFormat>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p, int rows_per_cta) {
  __shared__ Token tokens[kMostRows];
  wait_for_predecessor();
  let_successor_start();
  const int ctas = (p.total - 1) / rows_per_cta + 1, plan = int(blockIdx.x) / ctas, first = (int(blockIdx.x) - plan * ctas) * rows_per_cta;
  const int rows = min(rows_per_cta, p.total - first);
  find_tokens(p, plan, first, rows, tokens);

  const int lane = threadIdx.x & 31, before_rope = latent_chunks<kFormat>(p.pool), chunks = before_rope + kRopeChannels / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < rows; i += kWarps) {
    const Token token = tokens[i];
    char* out = static_cast<char*>(p.out) + (int64_t(plan) * p.total + first + i) * (16 * chunks);
    const Row<kFormat> row(p.pool, max(token.page, 0), token.offset);
    uint4 v[kRounds<kFormat>] = {};
    if (token.page >= 0) {
#pragma unroll
      for (int r = 0; r < kRounds<kFormat>; ++r) {
        const int c = lane + 32 * r;
        if constexpr (kFormat == KVFormat::kPlain) {
          if (c < chunks) v[r] = gather16(row.data + 16 * c);
        } else {
          using Layout = Fp8Layout<kFormat>;
          if (c < before_rope) {
            const int tile = c / (Layout::kTile / kChunk);
            const uint2 codes = gather8(row.data + 8 * c);
            float scale;
            if constexpr (kFormat == KVFormat::kFp8V32)
              scale = reinterpret_cast<const float*>(row.scales)[tile];
            else
              scale = e8m0(static_cast<unsigned char>(row.scales[tile]));
            v[r] = dequantize_chunk(codes, scale);
          } else if (c < chunks) {
            const char* from = row.data + Layout::kRope + 16 * (c - before_rope);
            if constexpr (kFormat == KVFormat::kFp8V32) {
              v[r] = gather16(from);
            } else {  // pages of an odd number of tokens begin on 8 bytes
              const uint2 low = gather8(from), high = gather8(from + 8);
              v[r] = make_uint4(low.x, low.y, high.x, high.y);
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRounds<kFormat>; ++r)
      if (lane + 32 * r < chunks) scatter16(out + 16 * (lane + 32 * r), v[r]);
  }
}

}  // namespace

Status run_gather(const GatherParams& p) {
  const auto kernel = p.pool.format == KVFormat::kFp8V32  ? gather_kernel<KVFormat::kFp8V32>
                      : p.pool.format == KVFormat::kFp8V4 ? gather_kernel<KVFormat::kFp8V4>
                                                          : gather_kernel<KVFormat::kPlain>;
  const int rows = int64_t(p.n) * p.total >= kManyRows ? kMostRows : kWarps;
  const unsigned grid = unsigned(p.n) * unsigned((p.total - 1) / rows + 1);
  if (cudaError_t err = launch(kernel, {grid, kThreads}, p.stream, p, rows)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla
