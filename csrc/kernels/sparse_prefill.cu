#include "kernels/sparse_prefill.h"

#include <cuda_bf16.h>

#include "splitkv/combine.h"

namespace jax_flashmla {

Status run_sparse_prefill(const SparsePrefillParams& p) {
  using sparse_prefill::launch_sparse_prefill;
  const auto launcher = p.format == KVFormat::kFp8V32 ? launch_sparse_prefill<__nv_bfloat16, 576, KVFormat::kFp8V32>
                        : p.d_qk > kDv                ? launch_sparse_prefill<__nv_bfloat16, 576, KVFormat::kPlain>
                                                      : launch_sparse_prefill<__nv_bfloat16, 512, KVFormat::kPlain>;
  if (Status error = launcher(p)) return error;
  return run_combine(p);
}

}  // namespace jax_flashmla
