// What time.cu calls of a variant: of a tree's csrc/, whose namespace variants.py renames.
#include <cuda_bf16.h>

#include "kernels/dense_decode.h"
#include "kernels/sparse_decode.h"
#include "kernels/sparse_prefill.h"
#include "splitkv/combine.h"
#include "splitkv/schedule.h"

namespace jax_flashmla {

// Parameters come as void*, because other variants have types of the same name; variants.py sees to it that params.h is the same.
template <class Params, Status (*kLaunch)(const Params&)>
static const char* attend(const void* params) {
  const auto& p = *static_cast<const Params*>(params);
  if (Status error = kLaunch(p)) return error;
  return run_combine(p);
}

static Status prefill(const SparsePrefillParams& p) {
  using sparse_prefill::launch_sparse_prefill;
  return p.d_qk > kDv ? launch_sparse_prefill<__nv_bfloat16, 576, KVFormat::kPlain>(p) : launch_sparse_prefill<__nv_bfloat16, 512, KVFormat::kPlain>(p);
}

static const char* plan(const void* params) { return run_schedule(*static_cast<const ScheduleParams*>(params)); }

}  // namespace jax_flashmla

// In the order of time.cu.
extern "C" {
extern const decltype(&jax_flashmla::plan) VARIANT[4] = {
    jax_flashmla::plan,
    jax_flashmla::attend<jax_flashmla::DenseDecodeParams, jax_flashmla::dense_decode::launch_dense_decode<__nv_bfloat16, 576>>,
    jax_flashmla::attend<jax_flashmla::SparseDecodeParams,
                         jax_flashmla::sparse_decode::launch_sparse_decode<__nv_bfloat16, 576, jax_flashmla::KVFormat::kFp8V32>>,
    jax_flashmla::attend<jax_flashmla::SparsePrefillParams, jax_flashmla::prefill>,
};
}
