#pragma once
#include "emulation.h"

namespace jax_flashmla {

template <class T>
T warp_scan(T value) {
  return emulation::together(value, [](auto of) {
    T sum = 0;
    for (int i = 0; i <= emulation::lane(); ++i) sum += of(i);
    return sum;
  });
}

inline bool elect() { return emulation::lane() == 0; }

}  // namespace jax_flashmla
