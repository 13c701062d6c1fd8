#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_sparse_decode(const SparseDecodeParams& params);  // picks the instantiation and launches it; then combine, where sequences may be split

namespace sparse_decode {
// Instantiated in sparse_decode_<format>.cu: plain rows of __nv_bfloat16 and __half, 576 and 512; fp8 as __nv_bfloat16, 576 of kFp8V32 and 512 of kFp8V4.
template <class T, int kDqk, KVFormat kFormat>
Status launch_sparse_decode(const SparseDecodeParams& params);
}  // namespace sparse_decode

}  // namespace jax_flashmla
