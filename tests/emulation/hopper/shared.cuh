#pragma once
#include "hopper/barrier.cuh"

namespace jax_flashmla {

// kTransposed: the element of row i, column j of a matrix goes to the j-th address instead of the i-th.
template <bool kTransposed>
void store_matrices_emulated(uint32_t address, const uint32_t (&words)[4]) {
  const int lane = emulation::lane();
  emulation::together(address, [&](auto address_of) {
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, column = 2 * (lane % 4) + e;
        const uint16_t x = uint16_t(words[m] >> 16 * e);
        std::memcpy(emulation::shared_memory + address_of(8 * m + (kTransposed ? column : row)) + 2 * (kTransposed ? row : column), &x, 2);
      }
    return 0;
  });
}
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { store_matrices_emulated<false>(address, {a, b, c, d}); }
inline void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices_emulated<true>(address, {a, b, c, d});
}
inline void store_shared(uint32_t address, float a, float b) {
  const float values[2] = {a, b};
  std::memcpy(emulation::shared_memory + address, values, 8);
}
inline uint4 load_shared(uint32_t address) {
  uint4 v;
  std::memcpy(&v, emulation::shared_memory + address, 16);
  return v;
}
inline int lane_again() { return emulation::lane(); }

}  // namespace jax_flashmla
