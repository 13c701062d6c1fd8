#include "kernels/sparse_decode.cuh"

template jax_flashmla::Status jax_flashmla::sparse_decode::launch_sparse_decode<__nv_bfloat16, 512, jax_flashmla::KVFormat::kFp8V4>(const SparseDecodeParams&);
