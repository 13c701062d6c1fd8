#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_dense_decode(const DenseDecodeParams& params);  // clears the counters of the merge, picks the instantiation, launches it

namespace dense_decode {
// Instantiated in dense_decode_<dtype>_<d_qk>.cu for __nv_bfloat16 and __half, 576 and 512.
template <class T, int kDqk>
Status launch_dense_decode(const DenseDecodeParams& params);
}  // namespace dense_decode

namespace dense_decode_few_rows {
// Query rows for which it is taken. It can do 32, and passes its emulated tests; 0 until it has run on a GPU.
inline constexpr int kMaxRows = 0;
// The same for few query rows, in dense_decode_few_rows_<dtype>_<d_qk>.cu.
template <class T, int kDqk>
Status launch_dense_decode_few_rows(const DenseDecodeParams& params);
}  // namespace dense_decode_few_rows

}  // namespace jax_flashmla
