#pragma once
#include <cstdio>
#include <cstdlib>

#include "emulation.h"

namespace jax_flashmla {

using Barrier = uint64_t;

inline uint32_t smem_address(const void* p) { return uint32_t(static_cast<const char*>(p) - emulation::shared_memory); }

inline emulation::TransactionBarrier& state_of(const Barrier& bar) { return emulation::cta->transaction[smem_address(&bar)]; }
inline void advance(emulation::TransactionBarrier& b) {
  if (b.pending < 0) std::fprintf(stderr, "more arrivals at a barrier than it counts\n"), std::abort();
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
}

inline void barrier_init(Barrier& bar, int count) { state_of(bar) = {count, count, 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_expect(Barrier& bar, uint32_t bytes) {
  auto& b = state_of(bar);
  b.bytes += bytes, --b.pending;
  advance(b);
}
inline void barrier_arrive(Barrier& bar) { barrier_expect(bar, 0); }
inline void barrier_complete(Barrier& bar, uint32_t bytes) {
  auto& b = state_of(bar);
  b.bytes -= bytes;
  advance(b);
}
inline void barrier_wait(Barrier& bar, uint32_t parity) {
  auto& b = state_of(bar);
  emulation::wait_until([&] { return (b.phase & 1) != parity; });
}

inline void named_sync(int id, int threads) { emulation::named_barrier(id, threads, true, false); }
inline void named_arrive(int id, int threads) { emulation::named_barrier(id, threads, false, false); }
inline void fence_async_proxy() {}

}  // namespace jax_flashmla
