#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_gather(const GatherParams& params);

}  // namespace jax_flashmla
