// Small launch helpers: programmatic dependent launch, clusters, register hand-over between warpgroups.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

#include "hopper/barrier.cuh"
#include "hopper/recording.h"

namespace jax_flashmla {

// Every kernel may start before its predecessor in the stream ends. A CTA waits here until that one is through and its writes are visible, before it touches
// what the predecessor writes or reads, and one CTA at least waits in any case: a kernel's end therefore stands for the end of all before it, which successors
// rely on, in CUDA graphs above all. Only combine does not wait for what dense decode hands over to it (splitkv/partial.cuh).
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// What the predecessor may be about to write, read before the wait: it may be of any age, and is good for nothing but to say what to prefetch. It does not come
// by L1, which would still have it after the wait.
template <class T>
__device__ __forceinline__ T read_early(const T& from) {
  static_assert(sizeof(T) % sizeof(int) == 0);
  T value;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(int); ++i) reinterpret_cast<int*>(&value)[i] = __ldcg(reinterpret_cast<const int*>(&from) + i);
  return value;
}

inline int64_t l2_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return bytes;
}

struct Shape {
  dim3 grid, block;
  size_t smem = 0;
  int cluster = 1;  // CTAs, along x
};

// Lets a kernel ask for so much dynamic shared memory. Always the same for a kernel: another thread may be launching it.
template <class... Args>
cudaError_t allow_shared_memory(void (*kernel)(Args...), size_t bytes) {
  if (recording) return cudaSuccess;  // XLA sees to that
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Shape& shape, cudaStream_t stream, const Args&... args) {
  const void* symbol = reinterpret_cast<const void*>(kernel);
  if (recording) {
    recording->launches.push_back(
        {symbol, shape.grid, shape.block, shape.smem, shape.cluster, {std::string(reinterpret_cast<const char*>(&args), sizeof(args))...}});
    return cudaSuccess;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(shape.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return cudaLaunchKernelExC(&config, symbol, pointers);
}

}  // namespace jax_flashmla
