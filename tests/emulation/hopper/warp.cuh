#pragma once
#include <functional>

#include "emulation.h"

namespace jax_flashmla {

template <class T, class Sum = std::plus<T>>
T warp_scan(T value, Sum plus = {}) {
  return emulation::together(value, [&](auto of) {
    T sum = of(0);
    for (int i = 1; i <= emulation::lane(); ++i) sum = plus(sum, of(i));
    return sum;
  });
}

inline bool elect() { return emulation::lane() == 0; }

}  // namespace jax_flashmla
