#include "kernels/sparse_decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "splitkv/combine.h"

namespace jax_flashmla {

Status run_sparse_decode(const SparseDecodeParams& p) {
  using sparse_decode::launch_sparse_decode;
  const bool bf16 = p.dtype == Dtype::kBF16, rope = p.d_qk > kDv;
  const auto plain = bf16 ? (rope ? launch_sparse_decode<__nv_bfloat16, 576, KVFormat::kPlain> : launch_sparse_decode<__nv_bfloat16, 512, KVFormat::kPlain>)
                          : (rope ? launch_sparse_decode<__half, 576, KVFormat::kPlain> : launch_sparse_decode<__half, 512, KVFormat::kPlain>);
  const auto launcher = p.format == KVFormat::kFp8V32  ? launch_sparse_decode<__nv_bfloat16, 576, KVFormat::kFp8V32>
                        : p.format == KVFormat::kFp8V4 ? launch_sparse_decode<__nv_bfloat16, 512, KVFormat::kFp8V4>
                                                       : plain;
  if (Status error = launcher(p)) return error;
  return run_combine(p);
}

}  // namespace jax_flashmla
