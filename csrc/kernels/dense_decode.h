#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_dense_decode(const DenseDecodeParams& params, Phase phase);  // picks the instantiation and launches it; then combine, where sequences may be split

namespace dense_decode {
// Instantiated in dense_decode_<dtype>_<d_qk>.cu for __nv_bfloat16 and __half, 576 and 512.
template <class T, int kDqk>
Status launch_dense_decode(const DenseDecodeParams& params);
}  // namespace dense_decode

}  // namespace jax_flashmla
