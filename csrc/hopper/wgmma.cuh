// Warpgroup matrix products over 64-column sub-tiles with 128-byte swizzle. PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "hopper/barrier.cuh"

namespace jax_flashmla {

namespace gmma = cute::SM90::GMMA;

// The instructions of attention by element type: scores (64x64, both operands K-major) and output (64x256, V read M-major out of the K tile),
// each with its A operand in shared memory (SS) or in registers (RS).
template <class T>
struct Atoms;
template <>
struct Atoms<__nv_bfloat16> {
  using QkSS = gmma::MMA_64x64x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
  using QkRS = gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;
  using PvSS = gmma::MMA_64x256x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::MN>;
  using PvRS = gmma::MMA_64x256x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct Atoms<__half> {
  using QkSS = gmma::MMA_64x64x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>;
  using QkRS = gmma::MMA_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K>;
  using PvSS = gmma::MMA_64x256x16_F32F16F16_SS<gmma::Major::K, gmma::Major::MN>;
  using PvRS = gmma::MMA_64x256x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;
};

namespace detail {
template <class Atom, int N, size_t... I>
__device__ __forceinline__ void mma_ss(float (&d)[N], uint64_t a, uint64_t b, gmma::ScaleOut s, std::index_sequence<I...>) {
  Atom::fma(a, b, d[I]..., s);
}
template <class Atom, int N, size_t... I>
__device__ __forceinline__ void mma_rs(float (&d)[N], const uint32_t* a, uint64_t b, gmma::ScaleOut s, std::index_sequence<I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., s);
}
}  // namespace detail

// d = A.B (+ d when accumulate): one k-step of 16.
template <class Atom, int N>
__device__ __forceinline__ void mma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate = true) {
  detail::mma_ss<Atom>(d, a, b, accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero, std::make_index_sequence<N>{});
}
template <class Atom, int N>
__device__ __forceinline__ void mma(float (&d)[N], const uint32_t* a, uint64_t b, bool accumulate = true) {
  detail::mma_rs<Atom>(d, a, b, accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero, std::make_index_sequence<N>{});
}

__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<N>();
}
// Pins registers to program order around an asynchronous product: the compiler does not know that wgmma is still writing them.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}

// Matrix descriptor of an operand in 128-byte swizzled atoms of 8 rows x 128 bytes (1 KB, aligned to that), `stride` bytes from eight rows to the next. In a
// sub-tile, 64 rows, they lie one behind the other. K-major operands: the leading offset is unused; a k-step of 16 elements is +2. M/N-major operands:
// `leading` is the distance from 64 columns to the next; a k-step of 16 rows is two strides.
inline constexpr int kAtomBytes = 8 * 128, kSubTileBytes = 8 * kAtomBytes;
__device__ __forceinline__ uint64_t smem_desc(const void* tile, uint32_t leading = 16, uint32_t stride = kAtomBytes) {
  return uint64_t((smem_address(tile) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | 1ull << 62;
}

}  // namespace jax_flashmla
