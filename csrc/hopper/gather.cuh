// Rows that are read once, from anywhere. PTX ISA: "ld", "cp.async", "cp.async.mbarrier.arrive", "cp.async.bulk", "prefetch".
//
// Loads with a condition are written so that they go straight into their registers: a branch or a select behind a load would wait for it. No load is
// ld.global.nc: the predecessor in the stream may still be writing when a kernel starts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hopper/barrier.cuh"

namespace jax_flashmla {

// Not .L1::no_allocate, though no line comes again: that costs 5 to 10 % (docs/kernels/cache_ops.md).
__device__ __forceinline__ uint4 gather16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 gather8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// kBytes (4 or 2), or `otherwise`.
template <int kBytes>
__device__ __forceinline__ uint32_t gather_word(const void* p, bool there, uint32_t otherwise) {
  uint32_t v;
  if constexpr (kBytes == 4)
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\nmov.u32 %0, %3;\n@there ld.global.u32 %0, [%1];\n}"
                 : "=&r"(v)
                 : "l"(p), "r"(unsigned(there)), "r"(otherwise));
  else
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\nmov.u32 %0, %3;\n@there ld.global.u16 %0, [%1];\n}"
                 : "=&r"(v)
                 : "l"(p), "r"(unsigned(there)), "r"(otherwise));
  return v;
}
// Sixteen bytes, or zeros, to shared memory, behind the back of this thread. p is a multiple of kAlign. An ordinary store to all others: fence_async_proxy().
template <int kAlign>
__device__ __forceinline__ void copy_async(uint32_t to, const void* p, bool there) {
  const uint32_t bytes = there ? kAlign : 0;
  if constexpr (kAlign == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(p), "r"(bytes) : "memory");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to + 8), "l"(static_cast<const char*>(p) + 8), "r"(bytes) : "memory");
  }
}
// An arrival when all copies of this thread so far are there.
__device__ __forceinline__ void barrier_arrive_behind_copies(Barrier& bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(&bar)) : "memory");
}
// Until all copies of this thread so far are there; the other threads still need a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// So many bytes, a multiple of 16 as are both addresses, to shared memory by the copy engine; they count for the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* p, uint32_t bytes, Barrier& bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(p), "r"(bytes), "r"(smem_address(&bar))
               : "memory");
}
// So many bytes, to L2: multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes)); }
// The line of 128 bytes that p points into, to L2.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace jax_flashmla
