#pragma once
#include "emulation.h"

namespace jax_flashmla {
inline float exp2_fast(float x) { return std::exp2(x); }
}  // namespace jax_flashmla
