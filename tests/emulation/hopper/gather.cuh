#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulation.h"
#include "hopper/barrier.cuh"
#include "hopper/shared.cuh"

namespace jax_flashmla {

template <int kBytes, int kAlign = kBytes, class T>
void gather_into(T& to, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kAlign) std::fprintf(stderr, "gather: an address that is not aligned\n"), std::abort();
  std::memcpy(&to, p, kBytes);
}
inline uint4 gather16(const void* p) {
  uint4 v;
  gather_into<16>(v, p);
  return v;
}
inline uint2 gather8(const void* p) {
  uint2 v;
  gather_into<8>(v, p);
  return v;
}
template <int kBytes>
uint32_t gather_word(const void* p, bool there, uint32_t otherwise) {
  uint32_t v = 0;
  if (!there) return otherwise;
  gather_into<kBytes>(v, p);
  return v;
}
template <int kAlign>
void copy_async(uint32_t to, const void* p, bool there) {
  emulation::cta->running->copies.push_back([to, p, there] {
    uint4 v{};
    if (there) gather_into<16, kAlign>(v, p);
    store_shared(to, v);
  });
}
inline void copy_bulk(uint32_t to, const void* p, uint32_t bytes, Barrier& bar) {
  if (reinterpret_cast<uintptr_t>(p) % 16 || to % 16 || bytes % 16) std::fprintf(stderr, "copy_bulk: something is no multiple of 16\n"), std::abort();
  emulation::at_any_time([to, p, bytes, &bar] {
    std::memcpy(emulation::shared_memory + to, p, bytes);
    barrier_complete(bar, bytes);
  });
}
inline void wait_for_copies() {
  for (const auto& copy : std::exchange(emulation::cta->running->copies, {})) copy();
}
inline void barrier_arrive_behind_copies(Barrier& bar) {
  emulation::at_any_time([copies = std::exchange(emulation::cta->running->copies, {}), &bar] {
    for (const auto& copy : copies) copy();
    barrier_arrive(bar);
  });
}
// Reads what it points to, so that an address out of bounds shows.
inline void prefetch_l2(const void* p, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; ++i) [[maybe_unused]]
    volatile char read = static_cast<const char*>(p)[i];
}
inline void prefetch_l2(const void* p) { [[maybe_unused]] volatile char read = *static_cast<const char*>(p); }

}  // namespace jax_flashmla
