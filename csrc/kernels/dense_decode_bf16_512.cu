#include "kernels/dense_decode.cuh"

template jax_flashmla::Status jax_flashmla::dense_decode::launch_dense_decode<__nv_bfloat16, 512>(const DenseDecodeParams&);
