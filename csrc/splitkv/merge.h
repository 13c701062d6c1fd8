#pragma once

#include "params.h"

namespace jax_flashmla {

// Zeros in the counters at which the CTAs of the decode kernel meet to merge the sequences that the schedule split. Launched right before that kernel.
Status clear_split_counters(const DenseDecodeParams& params);

}  // namespace jax_flashmla
