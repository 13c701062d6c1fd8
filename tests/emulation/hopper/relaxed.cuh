#pragma once
#include <cstdint>
#include <cstring>
#include <set>

#include "emulation.h"

namespace emulation {

// Of what a kernel hands over: addresses that it has marked and not written since, the uint4 it has written, those of them it had marked, and numbers of rows
// that it had not.
struct Marks {
  std::set<uintptr_t> absent;
  int units = 0, marked = 0, unmarked_rows = 0;
};
inline Marks marks;

// What is on its way to a kernel that runs already: whenever a warp looks for anything, one of these comes.
inline std::vector<Deed> handed_over;
inline void hand_over_one() {
  if (handed_over.empty()) return;
  handed_over.back()();
  handed_over.pop_back();
}

}  // namespace emulation

namespace jax_flashmla {

inline constexpr uint32_t kAbsent = ~0u;
inline void store_relaxed(uint4* to, const uint4& v) {
  auto& m = emulation::marks;
  if ((v.x & v.y & v.z & v.w) == kAbsent)
    m.absent.insert(uintptr_t(to));
  else
    ++m.units, m.marked += int(m.absent.erase(uintptr_t(to)));
  *to = v;
}
template <class T>
void store_relaxed(T* to, const T& v) {  // a number of a row, of which four are marked together
  emulation::marks.unmarked_rows += !emulation::marks.absent.contains(uintptr_t(to) & ~uintptr_t(15));
  *to = v;
}
// All lanes' at once: a line does not come between them.
template <class T>
T load_relaxed(const T* from, bool there) {
  auto& w = emulation::warp();
  w.slot[emulation::lane()] = there ? uintptr_t(from) : 0;
  emulation::warp_barrier();
  if (emulation::lane() == 0) {
    emulation::hand_over_one();
    for (int i = 0; i < 32; ++i) {
      const T value = w.slot[i] ? *reinterpret_cast<const T*>(w.slot[i]) : T{};
      std::memcpy(w.fragment[i], &value, sizeof(T));
    }
  }
  emulation::warp_barrier();
  T value;
  std::memcpy(&value, w.fragment[emulation::lane()], sizeof(T));
  emulation::warp_barrier();
  return value;
}
template <class... T>
void keep_inside(T&...) {}

}  // namespace jax_flashmla
