// The extension module: XLA FFI handlers as capsules, and the version of the FFI headers they were built with. Nothing else.
#include <nanobind/nanobind.h>

#include "ffi/handlers.h"

namespace nb = nanobind;

static nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

NB_MODULE(_C, m) {
  m.def("registrations", [](bool record) {
    nb::dict targets;
    if (record) {
      targets["jax_flashmla.targets.v1"] = capsule(jax_flashmla::RegisterTargets);
    } else {
      for (const auto& target : jax_flashmla::kTargets) targets[target.name] = capsule(target.execute);
    }
    return targets;
  });
  m.def("ffi_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}
