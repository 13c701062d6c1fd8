// Checks of a handler. The Python side has said all this in better words at trace time; an executable compiled by another version of the package still
// ends in an error here, never in a crash.
#pragma once

#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

#define FFI_CHECK(condition, message) \
  if (!(condition)) return ::xla::ffi::Error(::xla::ffi::ErrorCode::kInvalidArgument, std::string(message) + " (violated: " #condition ")")

#define FFI_LAUNCH(status) \
  if (const char* failed = (status)) return ::xla::ffi::Error(::xla::ffi::ErrorCode::kInternal, failed)

namespace jax_flashmla {

// An operand that is not used has no elements.
template <class Buffer>
auto data_or_null(Buffer& buffer, int64_t offset = 0) {
  return buffer.element_count() ? buffer.typed_data() + offset : nullptr;
}

}  // namespace jax_flashmla
