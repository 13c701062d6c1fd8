// What tests/test_emulation.py calls. The kernels' own launchers run; only what they call on is emulated.
#include "hopper/relaxed.cuh"
#include "hopper/tma.cuh"
#include "kernels/append.h"
#include "kernels/dense_decode.h"
#include "kernels/gather.h"
#include "kernels/sparse_decode.h"
#include "kernels/sparse_prefill.h"
#include "splitkv/combine.h"
#include "splitkv/schedule.h"

using namespace jax_flashmla;

extern "C" {
int params_bytes(int which) {
  constexpr size_t kBytes[] = {sizeof(DenseDecodeParams), sizeof(ScheduleParams), sizeof(SparseDecodeParams),
                               sizeof(AppendParams),      sizeof(GatherParams),   sizeof(SparsePrefillParams)};
  return int(kBytes[which]);
}
// Since the last call: how many, and how many for nothing.
void take_prefetches(int* all, int* unused) {
  *all = prefetches, *unused = int(prefetched.size());
  prefetches = 0, prefetched.clear();
}
const char* emulate_schedule(const ScheduleParams* p) { return run_schedule(*p); }
const char* emulate_dense_decode(const DenseDecodeParams* p) {
  if (Status error = p->d_qk == 576 ? dense_decode::launch_dense_decode<__nv_bfloat16, 576>(*p) : dense_decode::launch_dense_decode<__nv_bfloat16, 512>(*p))
    return error;
  return run_combine(*p);
}
const char* emulate_sparse_decode(const SparseDecodeParams* p) {
  using sparse_decode::launch_sparse_decode;
  const auto launcher = p->format == KVFormat::kFp8V32  ? launch_sparse_decode<__nv_bfloat16, 576, KVFormat::kFp8V32>
                        : p->format == KVFormat::kFp8V4 ? launch_sparse_decode<__nv_bfloat16, 512, KVFormat::kFp8V4>
                        : p->d_qk == 576                ? launch_sparse_decode<__nv_bfloat16, 576, KVFormat::kPlain>
                                                        : launch_sparse_decode<__nv_bfloat16, 512, KVFormat::kPlain>;
  if (Status error = launcher(*p)) return error;
  return run_combine(*p);
}
const char* emulate_sparse_prefill(const SparsePrefillParams* p) { return run_sparse_prefill(*p); }
const char* emulate_combine(const DecodeParams* p) { return run_combine(*p); }
// Combine while its partial results arrive, in any order, or lines behind all numbers of rows: lines of 128 bytes of `out`, and of a row what is written
// together.
const char* emulate_combine_meanwhile(const DecodeParams* p, const char* out, int64_t lines, const char* stats, int64_t rows, unsigned seed) {
  auto& coming = emulation::handed_over;  // the last one comes first
  auto add = [&](void* to, const char* from, int64_t at, size_t bytes) {
    coming.push_back([to = static_cast<char*>(to) + at, from = from + at, bytes] { std::memcpy(to, from, bytes); });
  };
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < lines; ++i) add(p->partial_out, out, 128 * i, 128);
  if (seed % 2 == 1) std::shuffle(coming.begin(), coming.end(), random);
  for (int64_t i = 0; i < rows; ++i)
    for (int part = 0; part < 3; ++part) add(p->partial_stats, stats, 16 * i + (part > 0 ? 4 * part + 4 : 0), part > 0 ? 4 : 8);
  std::shuffle(coming.begin() + (seed % 2 == 1 ? lines : 0), coming.end(), random);
  return run_combine(*p);
}
// Of all partial results since the last call: uint4 that were written, those of them that had been marked as absent, and numbers of rows that had not.
void take_marks(int* units, int* marked, int* unmarked_rows) {
  *units = emulation::marks.units, *marked = emulation::marks.marked, *unmarked_rows = emulation::marks.unmarked_rows;
  emulation::marks = {};
}
const char* emulate_append(const AppendParams* p) { return run_append(*p); }
const char* emulate_gather(const GatherParams* p) { return run_gather(*p); }
}
