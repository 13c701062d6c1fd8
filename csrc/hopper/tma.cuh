// Tensor maps on the host, tensor copies on the device. PTX ISA: "cp.async.bulk.tensor"; CUDA driver API: cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>

namespace jax_flashmla {

// The driver's encoder, looked up at run time: the extension links no libcuda, so that it imports where there is none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t err = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(err == cudaSuccess && found == cudaDriverEntryPointSuccess ? entry : nullptr);
  }();
  return encoder;
}

// Of a 4-D map: keys, which stream through L2. Of a 5-D map: queries.
__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t& bar, void* dst, int c0, int c1, int c2, int c3) {
  cute::SM90_TMA_LOAD_4D::copy(&map, &bar, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), dst, c0, c1, c2, c3);
}
__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t& bar, void* dst, int c0, int c1, int c2, int c3, int c4) {
  cute::SM90_TMA_LOAD_5D::copy(&map, &bar, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), dst, c0, c1, c2, c3, c4);
}
__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map, int c0, int c1, int c2, int c3) {
  cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, c0, c1, c2, c3);
}
__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map, int c0, int c1, int c2, int c3, int c4) {
  cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&map, c0, c1, c2, c3, c4);
}
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) { cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map)); }

}  // namespace jax_flashmla
