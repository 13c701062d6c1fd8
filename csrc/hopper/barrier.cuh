// Shared-memory mbarriers, named barriers and proxy fences. PTX ISA: "Parallel Synchronization and Communication Instructions".
// Written out, because CUTLASS's versions carry no "memory" clobber: ordinary shared-memory reads could move above a wait.
#pragma once

#include <cstdint>

namespace jax_flashmla {

using Barrier = uint64_t;

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(Barrier& bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&bar)), "r"(count) : "memory");
}
// Makes initialised barriers visible to the copy engine; a __syncthreads() must follow for the other threads.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(Barrier& bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&bar)) : "memory"); }
__device__ __forceinline__ void barrier_expect(Barrier& bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&bar)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over. A fresh barrier counts as having finished parity 1.
__device__ __forceinline__ void barrier_wait(Barrier& bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(smem_address(&bar)),
      "r"(parity)
      : "memory");
}

// bar.sync / bar.arrive: the arriving side goes on at once, the syncing side waits for all `threads`. Both order ordinary shared-memory accesses.
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Ordinary stores to shared memory become visible to wgmma and TMA only after this, executed by the storing thread or by one that has waited for it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace jax_flashmla
