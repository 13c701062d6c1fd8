#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulation.h"

namespace jax_flashmla {

template <class Vector>
void scatter(void* p, const Vector& v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) std::fprintf(stderr, "scatter: an address that is not aligned\n"), std::abort();
  std::memcpy(p, &v, sizeof(v));
}
inline void scatter16(void* p, uint4 v) { scatter(p, v); }
inline void scatter8(void* p, uint2 v) { scatter(p, v); }

}  // namespace jax_flashmla
