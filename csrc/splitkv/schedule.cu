// The split-KV schedule: cuts the KV blocks of a batch into `num_parts` parts of about equal cost. The integers are those of
// jax_flashmla/reference.py, which tells the rule in words.
//
// One CTA per plan. Costs are prefix-summed into shared memory; every part then finds its own boundary by binary search: no loop is longer than b / 512 or
// log2. Where whole sequences balance nearly as well, in the order in which they come or by their lengths, none is split; where pieces of one size do, every
// part is one piece.
//
// It is bound by instructions: every warp issues all of them, and few are executed twice. Hence no more warps than sequences are worth, and no unrolling.
#include <cuda_runtime_api.h>

#include "hopper/launch.cuh"
#include "hopper/warp.cuh"
#include "splitkv/schedule.h"

namespace jax_flashmla {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kSequenceOverhead = 2;    // what a piece costs besides its blocks, in blocks: Q, prologue, epilogue
constexpr int kSplitPenalty = 6;        // blocks; what partial results and merging them cost the whole batch
constexpr int kSplitPenaltyShare = 24;  // with several row tiles that share of a part, where it is more
constexpr int kMinSplit = 2;            // blocks; a pair is what the kernel works on
constexpr int kMinInvariantSplit = 16;  // batch-invariant plans: the length alone decides
constexpr int kMaxListed = 1024;        // sequences whose order is looked for: every one is compared with every other

struct Boundary {
  int seq, block;
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int blocks_of(int len) { return len > 0 ? (len - 1) / kBlockTokens + 1 : 0; }

// The first index below n for which `reached` holds, n if none; it must hold from there on.
template <class Reached>
__device__ __forceinline__ int first_index(int n, Reached reached) {
  int low = 0;
#pragma unroll 1
  while (low < n) {
    const int mid = (low + n) / 2;
    if (reached(mid))
      n = mid;
    else
      low = mid + 1;
  }
  return low;
}

// One buffer for all instances of the scan.
__device__ __forceinline__ auto warp_sums() -> int (&)[2][kWarps] {
  __shared__ int sums[2][kWarps];
  return sums;
}

// store(i, sum of value(0 .. i-1)) for i = 0 .. n. All threads must call.
template <class Value, class Store>
__device__ void exclusive_scan(int n, Value value, Store store) {
  auto& warp_sum = warp_sums();
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int before = 0;
#pragma unroll 1
  for (int base = 0, turn = 0; base < n; base += kThreads, turn ^= 1) {
    const int i = base + int(threadIdx.x), own = i < n ? value(i) : 0, inclusive = warp_scan(own);
    if (lane == 31) warp_sum[turn][warp] = inclusive;
    __syncthreads();
    const int warps = warp_scan(lane < kWarps ? warp_sum[turn][lane] : 0), below = __shfl_sync(~0u, warps, max(warp - 1, 0));
    if (i < n) store(i, before + (warp ? below : 0) + inclusive - own);
    before += __shfl_sync(~0u, warps, 31);
  }
  if (threadIdx.x == 0) store(n, before);
  __syncthreads();
}

__device__ void plan_invariant(const ScheduleParams& p, const int* lens, Part* parts, int* num_splits) {
  auto split_blocks = [&](int i) { return max(kMinInvariantSplit, ceil_div(blocks_of(lens[i]), kMaxInvariantSplits)); };
  auto splits = [&](int i) { return max(1, ceil_div(blocks_of(lens[i]), split_blocks(i))); };
#pragma unroll 1
  for (int row = threadIdx.x; row < p.b * kMaxInvariantSplits; row += kThreads) {
    const int i = row / kMaxInvariantSplits, s = row % kMaxInvariantSplits, size = split_blocks(i), n = splits(i);
    parts[row] = s >= n ? Part{p.b, 0, p.b, 0, 0} : s == n - 1 ? Part{i, s * size, i + 1, 0, s} : Part{i, s * size, i, (s + 1) * size, s};
  }
  exclusive_scan(p.b, [&](int i) { return splits(i) > 1 ? splits(i) : 0; }, [&](int i, int v) { num_splits[i] = v; });
}

// Every piece a part of its own, and the pieces of a sequence all of one size: what few and similar sequences want, where a part that ends one sequence
// and begins the next would be the slowest. The size is the smallest of 32 candidates for which the parts suffice; false, and nothing done, where it is
// larger than `limit`.
__device__ bool plan_even(const ScheduleParams& p, const int* lens, Part* parts, int* num_splits, int total_blocks, int cap, int limit, int* first_part) {
  __shared__ int pieces[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  auto blocks = [&](int i) { return min(blocks_of(lens[i]), cap); };
  auto pieces_of = [&](int i, int size) { return max(1, ceil_div(blocks(i) - (kMinSplit - 1), size)); };  // the last one not under the minimum
  const int low = (max(ceil_div(total_blocks, p.num_parts), kMinSplit) + 1) & ~1, stride = 2 * ceil_div(low, 64);
#pragma unroll 1
  for (int candidate = warp; candidate < 32; candidate += kWarps) {
    int sum = 0;
    for (int i = lane; i < p.b; i += 32) sum += pieces_of(i, low + candidate * stride);
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) pieces[candidate] = sum;
  }
  __syncthreads();
  const uint32_t enough = __ballot_sync(~0u, pieces[lane] <= p.num_parts);
  const int size = low + (__ffs(enough) - 1) * stride;
  if (enough == 0 || size > limit) return false;

  auto size_of = [&](int i) { return (ceil_div(blocks(i), pieces_of(i, size)) + 1) & ~1; };
  auto splits = [&](int i) { return pieces_of(i, max(size_of(i), 1)); };
  exclusive_scan(p.b, splits, [&](int i, int v) { first_part[i] = v; });
#pragma unroll 1
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
    const int seq = first_index(p.b, [&](int i) { return first_part[i + 1] > part; });
    if (seq == p.b) {
      parts[part] = {p.b, 0, p.b, 0, 0};
    } else {
      const int split = part - first_part[seq], own = size_of(seq);
      const bool last = part + 1 == first_part[seq + 1];
      parts[part] = {seq, split * own, last ? seq + 1 : seq, last ? 0 : (split + 1) * own, split};
    }
  }
  exclusive_scan(p.b, [&](int i) { return splits(i) > 1 ? splits(i) : 0; }, [&](int i, int v) { num_splits[i] = v; });
  return true;
}

// Whole sequences, a few a part, in turns: the longest that are left go to all parts, the longest of them to the part with the least so far, and so on.
// False, and nothing done, where a part costs more than `limit`.
__device__ bool plan_lists(const ScheduleParams& p, const int* prefix, Part* parts, int* num_splits, int limit) {
  __shared__ int order[kMaxListed], costs[kThreads];  // the longest sequence first; of the parts so far
#pragma unroll 1
  for (int i = threadIdx.x; i < p.b; i += kThreads) {
    const int own = prefix[i + 1] - prefix[i];
    int rank = 0;
    for (int j = 0, before = prefix[0]; j < p.b; ++j) {
      const int after = prefix[j + 1], other = after - before;
      rank += other > own || (other == own && j < i);
      before = after;
    }
    order[rank] = i;
  }
  const int part = threadIdx.x;
  int seq[kMostListed] = {}, count = 0, cost = 0;
#pragma unroll
  for (int turn = 0; turn < kMostListed; ++turn) {
    costs[part] = cost;
    __syncthreads();
    int rank = turn * p.num_parts;
    for (int j = 0; j < p.num_parts; ++j) rank += costs[j] < cost || (costs[j] == cost && j < part);
    if (part < p.num_parts && rank < p.b) seq[turn] = order[rank], ++count, cost += prefix[seq[turn] + 1] - prefix[seq[turn]];
    __syncthreads();
  }
  if (__syncthreads_or(cost > limit)) return false;
  if (part < p.num_parts) parts[part] = {seq[0], 0, seq[0] + count, 0, -1, {seq[1], seq[2], seq[3]}};
  for (int i = threadIdx.x; i <= p.b; i += kThreads) num_splits[i] = 0;
  return true;
}

__device__ void plan_balanced(const ScheduleParams& p, const int* lens, Part* parts, int* num_splits, int* shared) {
  int* prefix = shared;                                                                           // [b + 1] cost before each sequence
  int* whole = prefix + p.b + 1;                                                                  // [num_parts + 1] the cuts that split nothing
  auto* bounds = reinterpret_cast<Boundary*>(whole + p.num_parts + 1 + (p.b + p.num_parts) % 2);  // [num_parts + 1], on 8 bytes
  const int cap = (1 << 29) / p.b;  // keeps the sums in 32 bits; the last split of a sequence runs to its true end in any case
  exclusive_scan(p.b, [&](int i) { return min(blocks_of(lens[i]), cap) + kSequenceOverhead; }, [&](int i, int v) { prefix[i] = v; });

  const int total = prefix[p.b], extra = (p.num_parts - 1) * kSequenceOverhead, share = ceil_div(total, p.num_parts);
  const int step = max(ceil_div(total + extra, p.num_parts) - kSequenceOverhead, kMinSplit);
  const int jobs = ceil_div(p.num_parts + 1, 32) * 32;  // whole warps for either kind
#pragma unroll 1
  for (int job = threadIdx.x; job < 2 * jobs; job += kThreads) {
    const int part = job % jobs;
    if (part > p.num_parts) continue;
    if (job >= jobs) {  // without splits: a sequence belongs to the share that its middle falls into
      const int x = min(part * share, total);
      whole[part] = part == p.num_parts ? p.b : first_index(p.b, [&](int i) { return prefix[i] + prefix[i + 1] > 2 * x; });
    } else {  // with splits: equal steps, but no piece shorter than the minimum
      const int cut = part == 0 ? 0 : part == p.num_parts ? total : min(part * step + kSequenceOverhead, total);
      const int seq = first_index(p.b, [&](int i) { return prefix[i + 1] > cut; });
      Boundary bound{seq, 0};
      if (seq < p.b) {
        const int offset = cut - prefix[seq] - kSequenceOverhead, block = offset & ~1;  // blocks are worked on in pairs
        const int rest = prefix[seq + 1] - prefix[seq] - kSequenceOverhead - block;
        if (offset >= kMinSplit && block >= kMinSplit) bound = rest < kMinSplit ? Boundary{seq + 1, 0} : Boundary{seq, block};
      }
      bounds[part] = bound;
    }
  }
  __syncthreads();
  const int penalty = p.row_tiles > 1 ? max(kSplitPenalty, step / kSplitPenaltyShare) : kSplitPenalty;
  const int limit = step + kSequenceOverhead + penalty;  // what a part of whole sequences may cost
  bool unbalanced = false;
#pragma unroll 1
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) unbalanced |= prefix[whole[part + 1]] - prefix[whole[part]] > limit;
  const bool split = __syncthreads_or(unbalanced);
  const bool few = p.num_parts <= kThreads && p.b > p.num_parts && p.b <= min(kMostListed * p.num_parts, kMaxListed);
  if (split && p.lists && few && plan_lists(p, prefix, parts, num_splits, limit)) return;
  // A part of the plan with equal steps may be longer than its step by what a piece under the minimum adds.
  if (split && p.b <= p.num_parts && plan_even(p, lens, parts, num_splits, total - p.b * kSequenceOverhead, cap, step + kMinSplit - 1, prefix)) return;

  auto boundary = [&](int part) { return split ? bounds[part] : Boundary{whole[part], 0}; };
  // The first part that begins inside of a sequence, and one past the last: those whose step falls between its first and its last possible cut.
  auto first_inside = [&](int i) { return ceil_div(prefix[i] + kMinSplit, step); };
  auto end_inside = [&](int i) {
    const int last_cut = (prefix[i + 1] - prefix[i] - kSequenceOverhead - kMinSplit) | 1;
    return min((prefix[i] + max(last_cut, 0)) / step + 1, p.num_parts);
  };
#pragma unroll 1
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
    const Boundary begin = boundary(part), end = boundary(part + 1);
    parts[part] = {begin.seq, begin.block, end.seq, end.block, begin.block ? part + 1 - first_inside(begin.seq) : 0};
  }
  exclusive_scan(
      p.b,
      [&](int i) {
        const int inside = split ? end_inside(i) - first_inside(i) : 0;
        return inside > 0 ? inside + 1 : 0;
      },
      [&](int i, int v) { num_splits[i] = v; });
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  extern __shared__ int shared[];
  wait_for_predecessor();
  let_successor_start();
  const int* lens = p.cache_seqlens + int64_t(blockIdx.x) * p.b;
  Part* parts = p.metadata + int64_t(blockIdx.x) * p.num_parts;
  int* num_splits = p.num_splits + int64_t(blockIdx.x) * (p.b + 1);
  if (p.batch_invariant)
    plan_invariant(p, lens, parts, num_splits);
  else
    plan_balanced(p, lens, parts, num_splits, shared);
}

constexpr int kMaxShared = 220 * 1024;  // dynamic; the rest of a CTA's 227 KB is for the scans and the order

size_t shared_bytes(int b, int num_parts) { return size_t(b + num_parts + 3) * sizeof(int) + size_t(num_parts + 1) * sizeof(Boundary); }

}  // namespace

int max_schedule_batch(int num_parts) { return int((kMaxShared - shared_bytes(0, num_parts)) / sizeof(int)); }

Status run_schedule(const ScheduleParams& p) {
  const size_t smem = p.batch_invariant ? 0 : shared_bytes(p.b, p.num_parts);
  if (cudaError_t err = allow_shared_memory(schedule_kernel, kMaxShared)) return cudaGetErrorString(err);
  if (cudaError_t err = launch(schedule_kernel, {p.n, kThreads, smem}, p.stream, p)) return cudaGetErrorString(err);
  return nullptr;
}

}  // namespace jax_flashmla
