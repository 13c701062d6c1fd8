// Where a token's bytes are. jax_flashmla/kvcache/formats.py has the same table, and the emulated tests compare them byte for byte.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace jax_flashmla {

constexpr int kRopeChannels = 64;
constexpr int kChunk = 8;  // channels that a lane moves at once: 16 bytes of bfloat16, 8 of e4m3

// kLatent channels that share scales in tiles of kTile. kRow bytes a token; kRope is where the roped channels stand in them.
template <KVFormat kFormat>
struct Fp8Layout;
template <>
struct Fp8Layout<KVFormat::kFp8V32> {
  static constexpr int kLatent = 512, kTile = 128, kRow = 656, kScale = 512, kRope = 528;
};
template <>
struct Fp8Layout<KVFormat::kFp8V4> {  // behind the rows of a page 8 bytes a token: 7 scales and one that is 0
  static constexpr int kLatent = 448, kTile = 64, kRow = 576, kScaleRow = 8, kRope = 448;
};

// Chunks of a row, latent first.
template <KVFormat kFormat>
__device__ __forceinline__ int latent_chunks(const KVPool& pool) {
  if constexpr (kFormat == KVFormat::kPlain)
    return pool.latent / kChunk;
  else
    return Fp8Layout<kFormat>::kLatent / kChunk;
}

// A lane has chunks lane, lane + 32, ... of a row.
template <KVFormat kFormat>
constexpr int kRounds = kFormat == KVFormat::kFp8V4 ? 2 : 3;

template <KVFormat kFormat>
struct Row {
  char* data;
  char* scales;  // of fp8

  __device__ __forceinline__ Row(const KVPool& pool, int page, int offset) {
    char* start = static_cast<char*>(pool.data) + page * pool.page_bytes;
    if constexpr (kFormat == KVFormat::kPlain) {
      data = start + int64_t(offset) * (2 * (pool.latent + kRopeChannels)), scales = nullptr;
    } else {
      using Layout = Fp8Layout<kFormat>;
      data = start + int64_t(offset) * Layout::kRow;
      if constexpr (kFormat == KVFormat::kFp8V32)
        scales = data + Layout::kScale;
      else
        scales = start + int64_t(pool.page_size) * Layout::kRow + int64_t(offset) * Layout::kScaleRow;
    }
  }
};

}  // namespace jax_flashmla
