#pragma once
#include "hopper/barrier.cuh"

namespace jax_flashmla {

inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const int lane = emulation::lane();
  const uint32_t words[4] = {a, b, c, d};
  emulation::together(address, [&](auto address_of) {
    for (int m = 0; m < 4; ++m) std::memcpy(emulation::shared_memory + address_of(8 * m + lane / 4) + 4 * (lane % 4), &words[m], 4);
    return 0;
  });
}
inline uint4 load_shared(uint32_t address) {
  uint4 v;
  std::memcpy(&v, emulation::shared_memory + address, 16);
  return v;
}
template <class Vector>
void store_shared(uint32_t address, const Vector& v) {
  std::memcpy(emulation::shared_memory + address, &v, sizeof(v));
}
inline int lane_again() { return emulation::lane(); }

}  // namespace jax_flashmla
