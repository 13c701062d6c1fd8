#pragma once
#include "emulation.h"

namespace jax_flashmla {

inline void counter_add(uint64_t& counter, uint64_t n) { __atomic_fetch_add(&counter, n, __ATOMIC_SEQ_CST); }
inline uint64_t counter_load(uint64_t& counter) { return __atomic_load_n(&counter, __ATOMIC_SEQ_CST); }
inline uint64_t counter_arrive(uint64_t& counter, uint64_t n) { return __atomic_fetch_add(&counter, n, __ATOMIC_SEQ_CST); }
inline uint64_t counter_wait(uint64_t& counter) { return counter_load(counter); }

}  // namespace jax_flashmla
