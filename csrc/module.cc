// The extension module: XLA FFI handlers as capsules, and the version of the FFI headers they were built with. Nothing else.
#include <nanobind/nanobind.h>

#include "ffi/handlers.h"

namespace nb = nanobind;

NB_MODULE(_C, m) {
  m.def("registrations", [] {
    nb::dict targets;
    targets["jax_flashmla.schedule.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::Schedule));
    targets["jax_flashmla.dense_decode.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::DenseDecode));
    targets["jax_flashmla.sparse_decode.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::SparseDecode));
    targets["jax_flashmla.sparse_prefill.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::SparsePrefill));
    targets["jax_flashmla.append.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::Append));
    targets["jax_flashmla.gather.v1"] = nb::capsule(reinterpret_cast<void*>(jax_flashmla::Gather));
    return targets;
  });
  m.def("ffi_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}
