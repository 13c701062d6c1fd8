#include "kernels/dense_decode_few_rows.cuh"

template jax_flashmla::Status jax_flashmla::dense_decode_few_rows::launch_dense_decode_few_rows<__half, 576>(const DenseDecodeParams&);
