#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_sparse_prefill(const SparsePrefillParams& params);  // picks the instantiation and launches it; then combine, where sequences may be split

namespace sparse_prefill {
// Instantiated in sparse_prefill_<format>.cu, as __nv_bfloat16: plain rows of 576 and 512, and fp8 of kFp8V32.
template <class T, int kDqk, KVFormat kFormat>
Status launch_sparse_prefill(const SparsePrefillParams& params);
}  // namespace sparse_prefill

}  // namespace jax_flashmla
