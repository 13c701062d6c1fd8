// Writes new tokens into their slots of a pool, quantised on the way where the pool is fp8. The bytes are those of jax_flashmla/kvcache/quantize.py.
//
// A warp has a token. Its loads do not wait for the slot: all are in flight at once. Chunk c of a row is eight channels; a lane has chunks lane, lane + 32 and
// lane + 64, so that every load is 512 contiguous bytes of the warp and every store 512, or 256 of e4m3. A tile of fp8 is the chunks of 8 or 16 neighbours.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "attention/pack.cuh"
#include "hopper/convert.cuh"
#include "hopper/gather.cuh"
#include "hopper/launch.cuh"
#include "hopper/scatter.cuh"
#include "kernels/append.h"
#include "kernels/rows.cuh"

namespace jax_flashmla {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr uint32_t kInfinity = 0x7F800000, kNaN = 0x7FC00000, kNaNExponent = 255;

// Eight channels as they come.
template <class T>
struct Chunk {
  uint4 words[sizeof(T) / 2] = {};

  __device__ __forceinline__ void load(const void* row, int chunk) {
    const char* from = static_cast<const char*>(row) + chunk * int(sizeof(words));
    for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = gather16(from + 16 * i);
  }

  __device__ __forceinline__ void to_floats(float (&x)[kChunk]) const {
    auto pair = [&](int i, uint32_t word) {
      const float2 both = std::is_same_v<T, __half> ? from_f16x2(word) : from_bf16x2(word);
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    };
    auto four = [&](int i, const uint4& v) {
      x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y), x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
    };
    if constexpr (sizeof(T) == 4)
      four(0, words[0]), four(4, words[1]);
    else
      pair(0, words[0].x), pair(1, words[0].y), pair(2, words[0].z), pair(3, words[0].w);
  }

  // The same numbers as Out; those that are Out already keep their bits.
  template <class Out>
  __device__ __forceinline__ uint4 as() const {
    if constexpr (std::is_same_v<T, Out>) {
      return words[0];
    } else {
      float x[kChunk];
      to_floats(x);
      auto pair = [&](int i) { return pack<Out>(x[2 * i], x[2 * i + 1]); };
      return make_uint4(pair(0), pair(1), pair(2), pair(3));
    }
  }
};

// e4m3 codes of eight channels, and the biased exponent of the power of two that they count in: the smallest, 2^-13 at least, that brings the largest magnitude
// of the tile to 448 or less. A tile with an infinity or a NaN becomes NaN, its scale too. kLanes neighbours have a tile; all lanes must call.
template <int kLanes>
__device__ __forceinline__ uint2 quantize(const float (&x)[kChunk], uint32_t& exponent) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) top = max(top, __float_as_uint(x[i]) & 0x7FFFFFFF);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) top = max(top, __shfl_xor_sync(~0u, top, d));
  const bool finite = top < kInfinity;
  const int above = (top & 0x7FFFFF) > 0x600000;  // 448 is 1.75 * 2^8
  exponent = finite ? uint32_t(max(int(top >> 23) - 8 + above, 127 - 13)) : kNaNExponent;
  const float inverse = __uint_as_float((254 - exponent) << 23);
  auto scaled = [&](int i) { return finite ? x[i] * inverse : __uint_as_float(kNaN); };
  auto four = [&](int i) { return to_e4m3x2(scaled(i), scaled(i + 1)) | to_e4m3x2(scaled(i + 2), scaled(i + 3)) << 16; };
  return make_uint2(four(0), four(4));
}

// In: what comes. Out: what a plain row has; the roped channels of fp8 are bfloat16.
template <class In, KVFormat kFormat, class Out = __nv_bfloat16>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  wait_for_predecessor();
  let_successor_start();
  const int lane = threadIdx.x & 31;
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const int slot = p.slots[token], before_rope = latent_chunks<kFormat>(p.pool), chunks = row_chunks<kFormat>(p.pool);
  const char* latent = static_cast<const char*>(p.latent) + token * p.pool.latent * int64_t(sizeof(In));
  const char* rope = static_cast<const char*>(p.rope) + token * kRopeChannels * int64_t(sizeof(In));
  Chunk<In> chunk[kRounds<kFormat>];
#pragma unroll
  for (int r = 0; r < kRounds<kFormat>; ++r) {
    const int c = lane + 32 * r;
    if (c < chunks) chunk[r].load(c < before_rope ? latent : rope, c < before_rope ? c : c - before_rope);
  }
  const int page = slot / p.pool.page_size;
  if (slot < 0 || page >= p.pool.num_pages) return;
  const Row<kFormat> row(p.pool, page, slot - page * p.pool.page_size);
#pragma unroll
  for (int r = 0; r < kRounds<kFormat>; ++r) {
    const int c = lane + 32 * r;
    if constexpr (kFormat == KVFormat::kPlain) {
      if (c < chunks) scatter16(row.data + 16 * c, chunk[r].template as<Out>());
    } else {
      using Layout = Fp8Layout<kFormat>;
      constexpr int kLanes = Layout::kTile / kChunk;
      if (32 * r < Layout::kLatent / kChunk) {
        float x[kChunk];
        uint32_t exponent;
        chunk[r].to_floats(x);
        const uint2 codes = quantize<kLanes>(x, exponent);
        if (c < before_rope) scatter8(row.data + 8 * c, codes);
        if (lane % kLanes == 0) {
          if constexpr (kFormat == KVFormat::kFp8V32)
            reinterpret_cast<uint32_t*>(row.scales)[c / kLanes] = exponent == kNaNExponent ? kNaN : exponent << 23;
          else
            row.scales[c / kLanes] = char(c < before_rope ? exponent : 0);  // the eighth byte, where the roped channels begin, is 0
        }
      }
      if (c >= before_rope && c < chunks) {
        char* to = row.data + Layout::kRope + 16 * (c - before_rope);
        const uint4 v = chunk[r].template as<Out>();
        if constexpr (kFormat == KVFormat::kFp8V32)
          scatter16(to, v);
        else  // pages of an odd number of tokens begin on 8 bytes
          scatter8(to, make_uint2(v.x, v.y)), scatter8(to + 8, make_uint2(v.z, v.w));
      }
    }
  }
}

template <class In>
auto kernel_for(const KVPool& pool) -> void (*)(AppendParams) {
  switch (pool.format) {
    case KVFormat::kFp8V32:
      return append_kernel<In, KVFormat::kFp8V32>;
    case KVFormat::kFp8V4:
      return append_kernel<In, KVFormat::kFp8V4>;
    default:
      return pool.dtype == Dtype::kBF16 ? append_kernel<In, KVFormat::kPlain, __nv_bfloat16> : append_kernel<In, KVFormat::kPlain, __half>;
  }
}

}  // namespace

Status run_append(const AppendParams& p) {
  const auto kernel = p.dtype == Dtype::kBF16  ? kernel_for<__nv_bfloat16>(p.pool)
                      : p.dtype == Dtype::kF16 ? kernel_for<__half>(p.pool)
                                               : kernel_for<float>(p.pool);
  const unsigned grid = unsigned((int64_t(p.tokens) + kWarps - 1) / kWarps);
  if (cudaError_t err = launch(kernel, {grid, kThreads}, p.stream, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla
