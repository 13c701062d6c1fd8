#include "kernels/dense_decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "splitkv/combine.h"

namespace jax_flashmla {

Status run_dense_decode(const DenseDecodeParams& p, Phase phase) {
  if (phase == Phase::kCombine) return run_combine(p);
  using dense_decode::launch_dense_decode;
  const bool bf16 = p.dtype == Dtype::kBF16, rope = p.d_qk > kDv;
  const auto launcher = bf16 ? (rope ? launch_dense_decode<__nv_bfloat16, 576> : launch_dense_decode<__nv_bfloat16, 512>)
                             : (rope ? launch_dense_decode<__half, 576> : launch_dense_decode<__half, 512>);
  if (Status error = launcher(p)) return error;
  return phase == Phase::kAttend ? nullptr : run_combine(p);
}

}  // namespace jax_flashmla
