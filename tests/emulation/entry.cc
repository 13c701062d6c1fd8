// What tests/test_emulation.py calls. The kernels' own launchers run; only what they call on is emulated.
#include "kernels/dense_decode.h"
#include "splitkv/merge.h"
#include "splitkv/schedule.h"

using namespace jax_flashmla;

extern "C" {
int params_bytes(int which) { return which == 0 ? sizeof(DenseDecodeParams) : sizeof(ScheduleParams); }
const char* emulate_schedule(const ScheduleParams* p) { return run_schedule(*p); }
const char* emulate_dense_decode(const DenseDecodeParams* p, bool few_rows) {
  const bool rope = p->d_qk == 576;
  const auto launch = few_rows ? (rope ? dense_decode_few_rows::launch_dense_decode_few_rows<__nv_bfloat16, 576>
                                       : dense_decode_few_rows::launch_dense_decode_few_rows<__nv_bfloat16, 512>)
                               : (rope ? dense_decode::launch_dense_decode<__nv_bfloat16, 576> : dense_decode::launch_dense_decode<__nv_bfloat16, 512>);
  if (Status error = clear_split_counters(*p)) return error;
  return launch(*p);
}
}
