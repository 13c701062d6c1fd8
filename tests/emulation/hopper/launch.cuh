#pragma once
#include "hopper/barrier.cuh"

namespace cutlass::arch {
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}
}  // namespace cutlass::arch

namespace jax_flashmla {

inline void wait_for_predecessor() {}
inline void let_successor_start() {}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t, cudaStream_t, const Args&... args) {
  return emulation::launch(kernel, grid, block, args...);
}

}  // namespace jax_flashmla
