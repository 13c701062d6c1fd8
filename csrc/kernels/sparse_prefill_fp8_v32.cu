#include "kernels/sparse_prefill.cuh"

template jax_flashmla::Status jax_flashmla::sparse_prefill::launch_sparse_prefill<__nv_bfloat16, 576, jax_flashmla::KVFormat::kFp8V32>(
    const SparsePrefillParams&);
