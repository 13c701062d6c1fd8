#include "kernels/sparse_decode.cuh"

template jax_flashmla::Status jax_flashmla::sparse_decode::launch_sparse_decode<__half, 576, jax_flashmla::KVFormat::kPlain>(const SparseDecodeParams&);
template jax_flashmla::Status jax_flashmla::sparse_decode::launch_sparse_decode<__half, 512, jax_flashmla::KVFormat::kPlain>(const SparseDecodeParams&);
