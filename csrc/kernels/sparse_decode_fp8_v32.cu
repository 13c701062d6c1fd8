#include "kernels/sparse_decode.cuh"

template jax_flashmla::Status jax_flashmla::sparse_decode::launch_sparse_decode<__nv_bfloat16, 576, jax_flashmla::KVFormat::kFp8V32>(const SparseDecodeParams&);
