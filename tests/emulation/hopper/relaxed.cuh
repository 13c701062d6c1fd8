#pragma once
#include "emulation.h"

namespace jax_flashmla {

inline constexpr uint32_t kAbsent = ~0u;
template <class T>
void store_relaxed(T* to, const T& v) {
  *to = v;
}
template <class T>
T load_relaxed(const T* from, bool there) {
  return there ? *from : T{};
}
template <class... T>
void keep_inside(T&...) {}

}  // namespace jax_flashmla
