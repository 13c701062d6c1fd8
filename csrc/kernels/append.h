#pragma once

#include "params.h"

namespace jax_flashmla {

Status run_append(const AppendParams& params);

}  // namespace jax_flashmla
