// A pool of any format from its buffer.
#pragma once

#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "params.h"

namespace jax_flashmla {

inline ::xla::ffi::Error read_pool(::xla::ffi::AnyBuffer cache, KVPool& pool) {
  namespace ffi = ::xla::ffi;
  using V32 = Fp8Layout<KVFormat::kFp8V32>;
  using V4 = Fp8Layout<KVFormat::kFp8V4>;
  constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max(), kV32Token = V32::kRow, kV4Token = V4::kRow + V4::kScaleRow;
  const auto dims = cache.dimensions();
  const auto type = cache.element_type();
  const bool fp8 = type == ffi::U8 || type == ffi::F8E4M3FN, flat = dims.size() == 2;
  FFI_CHECK(fp8 || type == ffi::BF16 || type == ffi::F16, "cache must be bfloat16, float16, uint8 or float8_e4m3fn");
  FFI_CHECK((flat && fp8) || (dims.size() == 4 && dims[2] == 1), "cache [P, page_size, 1, d_qk or bytes of a token]; fp8_v4 also [P, bytes of a page]");
  const int64_t width = flat ? kV4Token : dims[3];
  FFI_CHECK(fp8 ? width == kV32Token || width == kV4Token : width == 576 || width == 512, "cache: the width of a token");
  const int64_t page_size = flat ? dims[1] / kV4Token : dims[1];
  pool.page_bytes = flat ? dims[1] : dims[1] * width * (fp8 ? 1 : 2);
  FFI_CHECK(page_size >= 1 && dims[0] >= 1 && page_size <= kIntMax && dims[0] <= kIntMax / page_size, "cache: 1 to 2147483647 tokens");
  FFI_CHECK(!flat || (pool.page_bytes % 8 == 0 && pool.page_bytes - page_size * kV4Token < V4::kPadding), "cache: the bytes of a page of fp8_v4");
  pool.data = cache.untyped_data();
  pool.num_pages = int(dims[0]), pool.page_size = int(page_size);
  pool.format = !fp8 ? KVFormat::kPlain : width == kV32Token ? KVFormat::kFp8V32 : KVFormat::kFp8V4;
  pool.latent = !fp8 ? int(width) - 64 : width == kV32Token ? V32::kLatent : V4::kLatent;
  pool.dtype = type == ffi::F16 ? Dtype::kF16 : Dtype::kBF16;
  return ffi::Error::Success();
}

}  // namespace jax_flashmla
