// A CTA on the host: every CUDA thread is a fiber, and shared memory is an array. With the headers in hopper/ beside it, which stand in for csrc/hopper/, the
// kernels compile as C++20 and run without a GPU. A fiber runs until it has to wait; which one goes on then is drawn. Asynchronous copies come at once or at
// any later time, which is drawn too; products read and write at once in some CTAs, and in others when they are waited for and not before. So it
// shows wrong indices, masks and phases, deadlocks, and missing waits: what is read before it came, or overwritten before it was read. It cannot show a missing
// fence, nor what two threads do between two waits.
#pragma once
#undef _FORTIFY_SOURCE  // knows one stack, and takes a jump to another one for a mistake

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;
using std::max, std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline __nv_bfloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {std::isnan(x) ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {to_bfloat16(x), to_bfloat16(y)}; }
// A magnitude as a number with so many bits of mantissa and this bias, to the nearest, ties to even, and no more than `most`.
inline uint32_t narrow(double size, int mantissa, int bias, uint32_t most) {
  if (size == 0) return 0;
  if (std::isinf(size)) return most;
  const int exponent = std::max(std::ilogb(size), 1 - bias);
  const auto steps = uint32_t(std::nearbyint(std::ldexp(size, mantissa - exponent)));
  return min(steps + (uint32_t(exponent + bias - 1) << mantissa), most);
}
inline __half to_half(float x) { return {uint16_t(std::isnan(x) ? 0x7FFF : narrow(std::fabs(x), 10, 15, 0x7C00) | std::signbit(x) << 15)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {to_half(x), to_half(y)}; }
inline float to_float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY) : std::ldexp(exponent ? 1024.f + mantissa : mantissa, std::max(exponent, 1) - 25);
  return std::copysign(size, x.bits >> 15 ? -1.f : 1.f);
}
inline float2 __half22float2(const __half2& x) { return {to_float(x.x), to_float(x.y)}; }

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
inline constexpr int cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, size_t) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulation {

inline constexpr size_t kSharedBytes = 232448;
alignas(1024) inline char shared_memory[kSharedBytes];

struct NamedBarrier {
  int arrived = 0, any = 0, result[2] = {};
  long generation = 0;
};
struct TransactionBarrier {
  int count = 0, pending = 0;
  long bytes = 0, phase = 0;
};
struct Warp {
  NamedBarrier barrier;
  uint64_t slot[32];
  uint32_t fragment[32][4];
};
using Deed = std::function<void()>;
struct Fiber {
  unsigned thread;
  std::vector<Deed> copies;                       // asked for, and not waited for
  std::deque<std::vector<Deed>> products = {{}};  // the same, by group; the last one is not committed
  jmp_buf state;
  bool started = false, done = false;
  bool (*may_go_on)(void*) = nullptr;  // null: it waits for nothing
  void* condition;
};
struct Cta {
  NamedBarrier named[16];
  std::map<uint32_t, TransactionBarrier> transaction;  // by shared-memory address
  std::vector<Warp> warps;
  std::vector<Deed> on_the_way;  // copies, to come when they like
  std::minstd_rand random;
  bool late_products;
  unsigned threads;
  void (*run)(void*);  // what every thread does
  void* kernel;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  explicit Cta(unsigned threads) : warps((threads + 31) / 32), threads(threads) {}
};
inline Cta* cta;

inline constexpr size_t kStackBytes = 1 << 18;
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void fiber_main() {
  cta->run(cta->kernel);
  cta->running->done = true;
  _longjmp(cta->scheduler, 1);
}

// Runs a fiber until it waits or ends.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  cta->running = &fiber;
  threadIdx = dim3(fiber.thread, 0, 0);
  if (_setjmp(cta->scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  while (stacks.size() <= fiber.thread) stacks.emplace_back(new char[kStackBytes]);
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[fiber.thread].get(), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

[[gnu::noinline]] inline void suspend(Fiber& fiber) {
  if (!_setjmp(fiber.state)) _longjmp(cta->scheduler, 1);
}

// Waits for what another thread does.
template <class Condition>
void wait_until(Condition condition) {
  if (condition()) return;
  Fiber& fiber = *cta->running;
  fiber.condition = &condition;
  fiber.may_go_on = [](void* c) { return (*static_cast<Condition*>(c))(); };
  suspend(fiber);
  fiber.may_go_on = nullptr;
}

inline Warp& warp() { return cta->warps[threadIdx.x / 32]; }
inline int lane() { return threadIdx.x & 31; }

inline bool arrive(NamedBarrier& b, int threads, bool waits, bool value) {
  b.any |= value;
  const long generation = b.generation;
  if (++b.arrived == threads) {
    b.result[generation & 1] = b.any;
    b.arrived = b.any = 0;
    ++b.generation;
  }
  if (waits) wait_until([&] { return b.generation != generation; });
  return b.result[generation & 1];
}
inline bool named_barrier(int id, int threads, bool waits, bool value) { return arrive(cta->named[id], threads, waits, value); }
inline void warp_barrier() { arrive(warp().barrier, 32, true, false); }

// Every lane brings a value; f sees all of them.
template <class T, class F>
auto together(T value, F f) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  std::memcpy(&w.slot[lane()], &value, sizeof(T));
  warp_barrier();
  auto result = f([&](int i) {
    T x;
    std::memcpy(&x, &w.slot[i], sizeof(T));
    return x;
  });
  warp_barrier();
  return result;
}

// What the copy engine does in its own time.
inline void at_any_time(Deed deed) {
  if (cta->random() & 1)
    deed();
  else
    cta->on_the_way.push_back(std::move(deed));
}
inline void arrive_one() {
  auto& waiting = cta->on_the_way;
  std::swap(waiting[cta->random() % waiting.size()], waiting.back());
  const Deed deed = std::move(waiting.back());
  waiting.pop_back();
  deed();
}

// One CTA, to its end. In every round each thread that may go on does, in another order each time.
inline void run_cta() {
  std::vector<Fiber> fibers(cta->threads);
  std::vector<Fiber*> left;
  for (unsigned t = 0; t < cta->threads; ++t) fibers[t].thread = t, left.push_back(&fibers[t]);
  while (!left.empty()) {
    std::shuffle(left.begin(), left.end(), cta->random);
    bool moved = false;
    while (!cta->on_the_way.empty() && cta->random() % 4 == 0) arrive_one();
    for (Fiber* fiber : left)
      if (!fiber->may_go_on || fiber->may_go_on(fiber->condition)) moved = true, resume(*fiber);
    if (!moved && !cta->on_the_way.empty()) {
      arrive_one();
    } else if (!moved) {
      const unsigned thread = left.front()->thread;
      std::fprintf(stderr, "deadlock: thread %u of CTA (%u, %u, %u)\n", thread, blockIdx.x, blockIdx.y, blockIdx.z);
      std::abort();
    }
    std::erase_if(left, [](const Fiber* fiber) { return fiber->done; });
  }
  if (!cta->on_the_way.empty()) std::fprintf(stderr, "a CTA ended before its copies came\n"), std::abort();
}

// Shared memory is full of NaN when a CTA starts, and one CTA runs at a time.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, const Args&... args) {
  auto body = [&] { kernel(args...); };
  static unsigned ctas = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Cta state(block.x);
        state.run = [](void* f) { (*static_cast<decltype(body)*>(f))(); };
        state.kernel = &body;
        state.random.seed(++ctas);
        state.late_products = state.random() >> 8 & 1;
        cta = &state, blockIdx = dim3(x, y, z), gridDim = grid;
        std::fill_n(reinterpret_cast<uint16_t*>(shared_memory), kSharedBytes / 2, uint16_t(0x7fc0));
        run_cta();
      }
  return cudaSuccess;
}

}  // namespace emulation

inline void __threadfence() {}
inline void __syncwarp() { emulation::warp_barrier(); }
inline void __syncthreads() { emulation::named_barrier(0, emulation::cta->threads, true, false); }
inline int __syncthreads_or(int value) { return emulation::named_barrier(0, emulation::cta->threads, true, value); }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return emulation::together(x, [&](auto of) { return of(from & 31); });
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::together(x, [&](auto of) { return of(emulation::lane() ^ mask); });
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  return emulation::together(x, [&](auto of) { return of(emulation::lane() - (emulation::lane() >= distance ? distance : 0)); });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return emulation::together(int(x), [](auto of) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(of(i)) << i;
    return votes;
  });
}
inline int __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }
inline int __reduce_add_sync(unsigned, int x) {
  return emulation::together(x, [](auto of) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += of(i);
    return sum;
  });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  return emulation::together(x, [](auto of) {
    unsigned any = 0;
    for (int i = 0; i < 32; ++i) any |= of(i);
    return any;
  });
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
