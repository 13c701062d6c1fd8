// Counters in global memory that CTAs meet at. PTX ISA: "atom", "red", "ld", with the scope of the GPU.
#pragma once

#include <cstdint>

namespace jax_flashmla {

__device__ __forceinline__ void counter_add(uint64_t& counter, uint64_t n) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(&counter), "l"(n) : "memory");
}
__device__ __forceinline__ uint64_t counter_load(uint64_t& counter) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(&counter) : "memory");
  return value;
}
// Adds n and returns what was there. What this CTA wrote before its last barrier is seen by whoever finds the arrival with counter_arrive or counter_wait.
__device__ __forceinline__ uint64_t counter_arrive(uint64_t& counter, uint64_t n) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(&counter), "l"(n) : "memory");
  return before;
}
__device__ __forceinline__ uint64_t counter_wait(uint64_t& counter) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(&counter) : "memory");
  return value;
}

}  // namespace jax_flashmla
