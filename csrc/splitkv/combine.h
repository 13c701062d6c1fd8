#pragma once

#include "params.h"

namespace jax_flashmla {

// Combines the partial results of the sequences that the schedule split. Launched right behind the decode kernel, on its parameters.
Status run_combine(const DecodeParams& params);
Status run_combine(const SparseDecodeParams& params);
Status run_combine(const SparsePrefillParams& params);

}  // namespace jax_flashmla
