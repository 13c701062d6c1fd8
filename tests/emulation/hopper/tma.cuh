#pragma once
#include <array>
#include <cstddef>
#include <set>

#include "hopper/barrier.cuh"

using CUresult = int;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
inline constexpr CUresult CUDA_SUCCESS = 0;
enum {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_INTERLEAVE_NONE,
  CU_TENSOR_MAP_SWIZZLE_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
};
struct CUtensorMap {
  int rank;
  char* base;
  uint64_t size[5], stride[5];  // stride in bytes
  uint32_t box[5];
};

namespace jax_flashmla {

// 128-byte swizzle of a shared-memory address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline auto tensor_map_encoder() {
  return
      [](CUtensorMap* map, int, int rank, void* base, const uint64_t* size, const uint64_t* stride, const uint32_t* box, const uint32_t*, int, int, int, int) {
        *map = {rank, static_cast<char*>(base), {}, {2}, {}};
        std::copy_n(size, rank, map->size), std::copy_n(box, rank, map->box), std::copy_n(stride, rank - 1, map->stride + 1);
        return CUDA_SUCCESS;
      };
}

// What was prefetched, and not loaded since.
inline std::set<std::vector<int>> prefetched;
inline int prefetches = 0;
template <class... Coordinates>
void tma_prefetch(const CUtensorMap&, Coordinates... coordinates) {
  prefetches += prefetched.insert({int(coordinates)...}).second;
}

template <class... Coordinates>
void tma_load(const CUtensorMap& map, Barrier& bar, void* dst, Coordinates... coordinates) {
  const int64_t start[] = {coordinates...};
  prefetched.erase({int(coordinates)...});
  emulation::at_any_time([&map, &bar, dst, start = std::to_array(start)] {
    uint32_t elements = 1;
    for (int i = 0; i < map.rank; ++i) elements *= map.box[i];
    for (uint32_t n = 0; n < elements; ++n) {
      uint32_t rest = n;
      int64_t offset = 0;
      bool inside = true;
      for (int i = 0; i < map.rank; rest /= map.box[i++]) {
        const int64_t x = start[i] + rest % map.box[i];
        inside &= x >= 0 && uint64_t(x) < map.size[i];
        offset += x * int64_t(map.stride[i]);
      }
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.base + offset, 2);
      std::memcpy(emulation::shared_memory + swizzled(smem_address(dst) + 2 * n), &value, 2);
    }
    barrier_complete(bar, 2 * elements);
  });
}
inline void tma_prefetch_map(const CUtensorMap&) {}

}  // namespace jax_flashmla
