#pragma once
#include "hopper/tma.cuh"

namespace jax_flashmla {

enum class Major { kK, kMN };
template <Major kA, Major kB>
struct Atom {
  static constexpr Major a = kA, b = kB;
};
template <class T>
struct Atoms {
  using QkSS = Atom<Major::kK, Major::kK>;
  using QkRS = QkSS;
  using PvSS = Atom<Major::kK, Major::kMN>;
  using PvRS = PvSS;
};
inline constexpr int kAtomBytes = 8 * 128, kSubTileBytes = 8 * kAtomBytes;
inline uint64_t smem_desc(const void* tile, uint32_t leading = 16, uint32_t stride = kAtomBytes) {
  return smem_address(tile) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

// Element `index` (a row of A or a column of B) and k of an operand in swizzled atoms.
template <Major kMajor>
float operand(uint64_t desc, int index, int k) {
  const uint32_t base = uint32_t(desc & 0x3FFF) << 4, leading = uint32_t(desc >> 16 & 0x3FFF) << 4, stride = uint32_t(desc >> 32 & 0x3FFF) << 4;
  const uint32_t at = kMajor == Major::kK ? index / 8 * stride + index % 8 * 128 + 2 * k : index / 64 * leading + k / 8 * stride + k % 8 * 128 + index % 64 * 2;
  uint16_t bits;
  std::memcpy(&bits, emulation::shared_memory + swizzled(base + at), 2);
  return to_float(bits);
}

template <class A, int N, class Row>
void multiply(float (&d)[N], uint64_t b, bool accumulate, Row a) {
  for (int i = 0; i < N / 4; ++i)
    for (int e = 0; e < 2; ++e) {
      float column[16];
      for (int k = 0; k < 16; ++k) column[k] = operand<A::b>(b, 8 * i + 2 * (emulation::lane() % 4) + e, k);
      for (int r = 0; r < 2; ++r) {
        float& x = d[4 * i + 2 * r + e];
        if (!accumulate) x = 0.f;
        for (int k = 0; k < 16; ++k) x += a[r][k] * column[k];
      }
    }
}
inline void issue(emulation::Deed product) {
  if (emulation::cta->late_products)
    emulation::cta->running->products.back().push_back(std::move(product));
  else
    product();
}
template <class A, int N>
void mma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate = true) {
  issue([&d, a, b, accumulate] {
    float rows[2][16];
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k) rows[r][k] = operand<A::a>(a, threadIdx.x % 128 / 32 * 16 + emulation::lane() / 4 + 8 * r, k);
    multiply<A>(d, b, accumulate, rows);
  });
}
template <class A, int N>
void mma(float (&d)[N], const uint32_t* a, uint64_t b, bool accumulate = true) {
  issue([&d, a, b, accumulate] {
    auto& w = emulation::warp();
    std::copy_n(a, 4, w.fragment[emulation::lane()]);
    emulation::warp_barrier();
    float rows[2][16];
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k) rows[r][k] = to_float(uint16_t(w.fragment[emulation::lane() / 4 * 4 + k % 8 / 2][r + 2 * (k / 8)] >> 16 * (k % 2)));
    emulation::warp_barrier();
    multiply<A>(d, b, accumulate, rows);
  });
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::cta->running->products.emplace_back(); }
template <int kGroups>
void wgmma_wait() {
  auto& groups = emulation::cta->running->products;
  for (; groups.size() > kGroups + 1; groups.pop_front())
    for (const auto& product : groups.front()) product();
}
template <int N>
void pin(float (&)[N]) {}

}  // namespace jax_flashmla
