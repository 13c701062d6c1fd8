// The rows of a pool, one by one.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace jax_flashmla {

constexpr int kRopeChannels = 64;
constexpr int kChunk = 8;  // channels that a lane moves at once: 16 bytes of bfloat16, 8 of e4m3

// Chunks of a row, latent first.
template <KVFormat kFormat>
__device__ __forceinline__ int latent_chunks(const KVPool& pool) {
  if constexpr (kFormat == KVFormat::kPlain)
    return pool.latent / kChunk;
  else
    return Fp8Layout<kFormat>::kLatent / kChunk;
}

template <KVFormat kFormat>
__device__ __forceinline__ int row_chunks(const KVPool& pool) {
  return latent_chunks<kFormat>(pool) + kRopeChannels / kChunk;
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
