#include "kernels/sparse_prefill.cuh"

template jax_flashmla::Status jax_flashmla::sparse_prefill::launch_sparse_prefill<__nv_bfloat16, 576, jax_flashmla::KVFormat::kPlain>(
    const SparsePrefillParams&);
template jax_flashmla::Status jax_flashmla::sparse_prefill::launch_sparse_prefill<__nv_bfloat16, 512, jax_flashmla::KVFormat::kPlain>(
    const SparsePrefillParams&);
