#include "kernels/dense_decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "splitkv/merge.h"

namespace jax_flashmla {

namespace {
template <class T, int kDqk>
Status launch(const DenseDecodeParams& p) {
  return p.rows <= dense_decode_few_rows::kMaxRows ? dense_decode_few_rows::launch_dense_decode_few_rows<T, kDqk>(p)
                                                   : dense_decode::launch_dense_decode<T, kDqk>(p);
}
}  // namespace

Status run_dense_decode(const DenseDecodeParams& p) {
  const bool bf16 = p.dtype == Dtype::kBF16, rope = p.d_qk > kDv;
  const auto launcher = bf16 ? (rope ? launch<__nv_bfloat16, 576> : launch<__nv_bfloat16, 512>) : (rope ? launch<__half, 576> : launch<__half, 512>);
  if (p.num_parts > 1)  // one part splits nothing
    if (Status error = clear_split_counters(p)) return error;
  return launcher(p);
}

}  // namespace jax_flashmla
