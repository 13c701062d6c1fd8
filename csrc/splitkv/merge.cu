#include "splitkv/merge.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "hopper/launch.cuh"

namespace jax_flashmla {
namespace {

constexpr int kThreads = 256, kMaxCtas = 132;

__global__ void clear_split_counters_kernel(uint64_t* counters, int64_t count) {
  let_successor_start();
  wait_for_predecessor();
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) counters[i] = 0;
}

}  // namespace

Status clear_split_counters(const DenseDecodeParams& p) {
  const int64_t count = int64_t(p.slots) * p.h_kv * ((p.rows + kRowTile - 1) / kRowTile), ctas = (count + kThreads - 1) / kThreads;
  const dim3 grid(unsigned(std::min<int64_t>(ctas, kMaxCtas)));
  const cudaError_t err = launch(clear_split_counters_kernel, {grid, kThreads}, p.stream, p.counters, count);
  return err == cudaSuccess ? nullptr : cudaGetErrorString(err);
}

}  // namespace jax_flashmla
