#pragma once
#include "emulation.h"

namespace jax_flashmla {

inline int warp_scan(int value) {
  return emulation::together(value, [](auto of) {
    int sum = 0;
    for (int i = 0; i <= emulation::lane(); ++i) sum += of(i);
    return sum;
  });
}

}  // namespace jax_flashmla
