// What tests/test_emulation.py calls. The kernels' own launchers run; only what they call on is emulated.
#include "kernels/dense_decode.h"
#include "splitkv/combine.h"
#include "splitkv/schedule.h"

using namespace jax_flashmla;

extern "C" {
int params_bytes(int which) { return which == 0 ? sizeof(DenseDecodeParams) : sizeof(ScheduleParams); }
const char* emulate_schedule(const ScheduleParams* p) { return run_schedule(*p); }
const char* emulate_dense_decode(const DenseDecodeParams* p) {
  if (Status error = p->d_qk == 576 ? dense_decode::launch_dense_decode<__nv_bfloat16, 576>(*p) : dense_decode::launch_dense_decode<__nv_bfloat16, 512>(*p))
    return error;
  return p->num_parts > 1 ? run_combine(*p) : nullptr;
}
const char* emulate_combine(const DenseDecodeParams* p) { return run_combine(*p); }
}
