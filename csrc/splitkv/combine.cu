// Combines partial results, in float32 and in a fixed order:
//
//   out = sum_s w_s O_s / sum_s w_s l_s,   w_s = 2^(m_s - max m)
//
// A job is some fragments of 16 rows (partial.cuh) of one sequence. In which order the splits of a fragment are added depends on their number alone, so
// that a batch-invariant plan gives batch-invariant bits.
//
// Its time is latency. CTAs are on their SMs before the decode kernel ends, two at most, and by then know what to load; a warp asks for everything at once.
// Behind dense decode it does so as soon as its own splits are there, which costs less than the end of a kernel does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention/finish.cuh"
#include "attention/softmax.cuh"
#include "hopper/launch.cuh"
#include "hopper/relaxed.cuh"
#include "hopper/warp.cuh"
#include "splitkv/combine.h"
#include "splitkv/partial.cuh"

namespace jax_flashmla {
namespace {

// How often a warp looks for what is absent before it waits for the end of the decode kernel: a plan that is made up may promise what never comes.
constexpr int kPatience = 1000;
constexpr int kWarps = 8, kThreads = kWarps * 32, kCtasPerSm = 2, kMaxCtas = kCtasPerSm * 132;

// What warps that share a fragment tell each other: of rows, and each lane's numbers.
struct Storage {
  float top[kWarps][kFragmentRows], sum[kWarps][kFragmentRows], x[kWarps][8][kFragmentLanes];
};
// So much shared memory that no third CTA fits: the first SMs that are done would get them all.
constexpr size_t kSharedMemory = 80 * 1024;
static_assert(sizeof(Storage) <= kSharedMemory && kCtasPerSm * kSharedMemory <= 226 * 1024 && (kCtasPerSm + 1) * kSharedMemory > 227 * 1024);

// A warp asks for sixteen uint4 at once: all splits of two or four fragments where these are few, else splits of one fragment, which several warps may share.
// Where there is little to do in all it is spread: `most` fragments per warp in any case.
__host__ __device__ constexpr int warp_fragments(int splits, int most) { return std::min(most, splits <= 4 ? 4 : splits <= 8 ? 2 : 1); }
__host__ __device__ constexpr int sharers_of(int splits) { return splits <= 16 ? 1 : splits <= 32 ? 2 : splits <= 64 ? 4 : kWarps; }
__host__ __device__ constexpr int jobs_per_group(int splits, int most) { return kRowFragments * sharers_of(splits) / (warp_fragments(splits, most) * kWarps); }

// A number of row lane % 16, in this lane or `from` + that one, for this thread's rows: lane / 4 and lane / 4 + 8.
struct OfRows {
  float of[2];

  __device__ __forceinline__ OfRows(float of_row, int lane, int from = 0)
      : of{__shfl_sync(~0u, of_row, from + lane / 4), __shfl_sync(~0u, of_row, from + lane / 4 + 8)} {}
};

// This thread's eight numbers of a fragment, two a word, of its two rows in turn.
struct Sum {
  float x[8] = {};

  __device__ __forceinline__ void add(const Sum& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += other.x[i];
  }
  __device__ __forceinline__ void add(const OfRows& factor, const Sum& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = fmaf(factor.of[i / 2 % 2], other.x[i], x[i]);
  }
  __device__ __forceinline__ void add(const OfRows& weight, const uint4& partial) {
    const uint32_t words[4] = {partial.x, partial.y, partial.z, partial.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      x[2 * i] = fmaf(weight.of[i & 1], v.x, x[2 * i]), x[2 * i + 1] = fmaf(weight.of[i & 1], v.y, x[2 * i + 1]);
    }
  }
};

// Job `job` of 16 rows of a sequence.
template <class T, class Params>
__device__ __forceinline__ void combine(const Params& p, int seq, int kv_head, int group, int first_slot, int splits, int most, int job, int& patience,
                                        Storage& smem) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  const int sharers = sharers_of(splits), sharer = warp & (sharers - 1);
  int fragments = warp_fragments(splits, most);
  const int own = (splits - sharer + sharers - 1) / sharers;  // splits that this warp adds
  const int fragment = (job * kWarps + warp) / sharers * fragments, half = fragment / (kRowFragments / 2);
  int64_t step = sharers * (partial_fragments(p, 1, 0, 0) - partial_fragments(p, 0, 0, 0));
  int stats_step = sharers * p.h_kv * p.rows;
  const uint4* partials = partial_fragments(p, first_slot + sharer, kv_head, group) + fragment * kFragmentLanes + lane;
  // What splits tell of their rows: the halves of the warp look at every second split, each lane at one row.
  const int own_row = group * kFragmentRows + lane % kFragmentRows;
  const PartialStats* stats = partial_stats(p, first_slot + sharer, kv_head, own_row);
  int index[2];  // -1: past the last row
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = group * kFragmentRows + lane / 4 + 8 * r;
    index[r] = row < p.rows ? row / p.group * p.h_q + kv_head * p.group + row % p.group : -1;
  }
  if constexpr (kSparse<Params>) wait_for_predecessor();
  // Whether to look again, behind the end of the decode kernel for the last time, and then without what L1 still has of before.
  auto wait = [&](bool absent) {
    if (patience < 0 || !__any_sync(~0u, absent)) return false;
    if (patience-- == 0) wait_for_predecessor(), __threadfence();
    return true;
  };

  float top = -INFINITY, total = 0.f;  // of row lane % 16: the largest reference and the sum
  Sum before, sum[4];                  // of earlier rounds, and of the four loads
  int turn = 0;
#pragma unroll 1
  // Every warp comes here once at least. `known`: of the splits that are left, those that tell of this lane's row; none where it is past the last.
  for (int rest = own, known = own_row < p.rows ? own : 0; rest > 0; rest -= 16, known -= 16, ++turn) {
    struct {
      float reference, sum, scale;  // the scale of the fragments' half; it becomes a weight
    } of[8];
    uint4 batch[4][4];
    // At first by one number of each split, so that those who wait are in nobody's way.
    const float* sign = &stats[int64_t(16 * turn + lane) * stats_step - lane % kFragmentRows].scale[half];
    while (!kSparse<Params> && wait(__float_as_uint(load_relaxed(sign, lane < min(rest, 16))) == kAbsent)) continue;
    bool again;
    do {
      keep_inside(step, stats_step, fragments, turn);  // the addresses below: there are no registers for them
      // The sixteen loads are four times four of this warp's splits: of a fragment each, of two fragments by pairs, or of one.
      const int quad_splits = fragments == 4 ? 0 : 4, pair_splits = fragments == 1 ? 8 : 0;
      const int64_t quad = fragments == 4 ? kFragmentLanes : 4 * step, pair = fragments == 1 ? 8 * step : fragments / 2 * kFragmentLanes;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int split = i / 4 * pair_splits + i / 2 % 2 * quad_splits + i % 2 * 2 + lane / kFragmentRows;
        const PartialStats* from = stats + int64_t(16 * turn + split) * stats_step;
        auto& [m, l, scale] = of[i];
        m = -INFINITY, l = scale = 0.f;
        if (split < known) {
          const float2 both = reinterpret_cast<const float2&>(*from);  // by one load, as they were stored: where one is there both are
          m = both.x, l = both.y, scale = from->scale[half];
        }
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint4* from = partials + (16 * turn * step + a / 2 * pair + a % 2 * quad);
#pragma unroll
        for (int b = 0; b < 4; ++b, from += step) batch[a][b] = load_relaxed(from, a / 2 * pair_splits + a % 2 * quad_splits + b < rest);
      }
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = max(largest, max(__float_as_uint(of[i].reference), __float_as_uint(of[i].scale)));
#pragma unroll
      for (int i = 0; i < 16; ++i) largest = max(largest, batch[i / 4][i % 4].w);
      again = wait(largest == kAbsent);
      if (again) __threadfence();  // L1, by which the warps share what splits tell of rows, may have it as it was
    } while (again);
    const float old = top;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, of[i].reference);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, kFragmentRows));
    float part = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // A split in which the row has no key has m = -inf and l = 0; with NaN among its scores m = -inf and l = NaN.
      auto& [m, l, scale] = of[i];
      const float weight = m == -INFINITY ? (l == 0.f ? 0.f : 1.f) : exp2_fast(m - top);
      if (i < 8 / fragments) part = fmaf(weight, l, part);
      scale *= weight;
    }
    const float grown = rescale_factor(old, top);
    total = fmaf(total, grown, part + __shfl_xor_sync(~0u, part, kFragmentRows));
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      sum[a] = {};
      if (a / 2 * (fragments == 1 ? 8 : 0) + a % 2 * (fragments == 4 ? 0 : 4) >= rest) continue;
#pragma unroll
      for (int b = 0; b < 4; ++b) sum[a].add(OfRows(of[2 * a + b / 2].scale, lane, b % 2 * kFragmentRows), batch[a][b]);
    }
    if (fragments < 4) sum[0].add(sum[1]), sum[2].add(sum[3]);
    if (fragments == 2) sum[1] = sum[2];
    if (fragments == 1) sum[0].add(sum[2]);
    if (turn > 0) sum[0].add(OfRows(grown, lane), before);
    before = sum[0];
  }
  if (sharers > 1) {
    if (lane < kFragmentRows) smem.top[warp][lane] = top, smem.sum[warp][lane] = total;
#pragma unroll
    for (int i = 0; i < 8; ++i) smem.x[warp][i][lane] = sum[0].x[i];
    __syncthreads();
    if (sharer > 0) return;
#pragma unroll 1
    for (int from = warp + 1; from < warp + sharers; ++from) top = fmaxf(top, smem.top[from][lane % kFragmentRows]);
    sum[0] = {}, total = 0.f;
#pragma unroll 1
    for (int from = warp; from < warp + sharers; ++from) {
      const float weight = rescale_factor(smem.top[from][lane % kFragmentRows], top);
      Sum other;
#pragma unroll
      for (int i = 0; i < 8; ++i) other.x[i] = smem.x[from][i][lane];
      total = fmaf(weight, smem.sum[from][lane % kFragmentRows], total);
      sum[0].add(OfRows(weight, lane), other);
    }
  }

  const bool any = total != 0.f;         // a row without a key: output 0, lse -inf; NaN goes through
  const float lse = top + log2f(total);  // base 2
  float inverse = any ? 1.f / total : 0.f;
  if (kSparse<Params> && any && own_row < p.rows) inverse *= sink_factor(p, seq, own_row, lse);  // one token, so a row is a head
  const OfRows factor(inverse, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (index[r] < 0) continue;
    auto* out =
        reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + (int64_t(seq) * p.s_q * p.h_q + index[r]) * kDv + fragment * kFragmentColumns) + (lane & 3);
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (a < fragments) out[8 * a + 4 * i] = pack<T>(sum[a].x[4 * i + 2 * r] * factor.of[r], sum[a].x[4 * i + 2 * r + 1] * factor.of[r]);
  }
  if (fragment == 0 && lane < kFragmentRows && own_row < p.rows) {
    const int token = own_row / p.group, head = kv_head * p.group + own_row % p.group;
    p.lse[lse_index(p, seq, head, token)] = any ? lse * kLn2 : -INFINITY;
    if constexpr (std::is_same_v<Params, SparsePrefillParams>) {
      float logit = -INFINITY;
      for (int s = 0; s < splits; ++s) logit = fmaxf(logit, p.partial_max[int64_t(first_slot + s) * p.h_q + head]);
      p.max_logits[int64_t(seq) * p.h_q + head] = logit;
    }
  }
}

template <class T, class Params>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) combine_kernel(const __grid_constant__ Params p, int sequences, int most) {
  extern __shared__ char raw[];
  auto& smem = *reinterpret_cast<Storage*>(raw);
  let_successor_start();
  // The plan is there already: the decode kernel lets this one start when whoever made the plan is through. A job waits for what it adds, and the first CTA for
  // the end of the decode kernel: successors take this kernel's end for the end of all before it. The others, without a job, leave their SMs to the next
  // kernel.
  const int lane = threadIdx.x & 31, groups = (p.rows + kFragmentRows - 1) / kFragmentRows, kv_groups = p.h_kv * groups;
  int own = blockIdx.x, before = 0;  // this CTA's next job, and the jobs of earlier sequences
  int patience = kSparse<Params> ? -1 : kPatience;
  const int end = p.num_splits[p.b] == 0 ? 0 : sequences;
  for (int x0 = 0; x0 < end; x0 += 32) {  // every warp looks at 32 sequences at once
    // Sequence x, or, where there are more sequences than parts, the one whose split 1 is at the start of part x + 1.
    const int x = x0 + lane;
    int seq = x < end ? x : -1;
    if (x < end && p.b >= p.num_parts) {
      const Part part = p.metadata[x + 1];
      seq = part.begin_split == 1 ? part.begin_seq : -1;
    }
    const bool there = seq >= 0 && seq < p.b;
    const int first = there ? p.num_splits[seq] : 0, splits = there ? p.num_splits[seq + 1] - first : 0;
    const bool split = splits >= 2 && first >= 0 && splits <= p.slots - first;  // else whole, or a made-up plan
    const int jobs = split ? jobs_per_group(splits, most) * kv_groups : 0;
    const int through = warp_scan(jobs), all = __shfl_sync(~0u, through, 31);
    for (; own < before + all; own += gridDim.x) {
      const int from = __ffs(__ballot_sync(~0u, before + through > own)) - 1;
      auto of = [&](int value) { return __shfl_sync(~0u, value, from); };
      const int seq_splits = of(splits), job = own - before - of(through - jobs), per_group = jobs_per_group(seq_splits, most), kv_group = job / per_group;
      combine<T>(p, of(seq), kv_group / groups, kv_group % groups, of(first), seq_splits, most, job % per_group, patience, smem);
      __syncthreads();  // the storage is free
    }
    before = min(before + all, 1 << 30);  // a plan that is made up may promise any number
  }
  if (blockIdx.x == 0) wait_for_predecessor();
}

template <class T, class Params>
cudaError_t launch_combine(const Params& p) {
  const auto kernel = combine_kernel<T, Params>;
  if (cudaError_t err = allow_shared_memory(kernel, kSharedMemory)) return err;
  const int sequences = std::min(p.b, p.num_parts - 1);
  // A CTA per job, as far as that can be told without the plan.
  const int64_t most_groups = int64_t(sequences) * p.h_kv * ((p.rows + kFragmentRows - 1) / kFragmentRows);
  const int splits = p.num_parts / p.b;
  int most = 1;
  while (most < 4 && most_groups * jobs_per_group(splits, most) > kMaxCtas) most *= 2;
  const unsigned grid = unsigned(std::min<int64_t>(most_groups * jobs_per_group(splits, most), kMaxCtas));
  return launch(kernel, {grid, kThreads, kSharedMemory}, p.stream, p, sequences, most);
}

}  // namespace

template <class Params>
static Status run(const Params& p) {
  if (p.num_parts == 1 || !p.num_splits) return nullptr;  // nothing is split
  const cudaError_t err = p.dtype == Dtype::kBF16 ? launch_combine<__nv_bfloat16>(p) : launch_combine<__half>(p);
  return err == cudaSuccess ? nullptr : cudaGetErrorString(err);
}

Status run_combine(const DecodeParams& p) { return run(p); }
Status run_combine(const SparseDecodeParams& p) { return run(p); }
Status run_combine(const SparsePrefillParams& p) { return run(p); }

}  // namespace jax_flashmla
