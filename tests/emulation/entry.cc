// What tests/test_emulation.py calls. The kernels' own launchers run; only what they call on is emulated.
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
const char* emulate_append(const AppendParams* p) { return run_append(*p); }
const char* emulate_gather(const GatherParams* p) { return run_gather(*p); }
}
