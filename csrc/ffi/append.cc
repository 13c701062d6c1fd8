#include "kernels/append.h"

#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/in_place.h"
#include "ffi/pool.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

// The result is to be the buffer of the first operand: XLA copies a cache that it may not overwrite before it calls.
static ffi::Error AppendImpl(Stream stream, ffi::AnyBuffer cache, ffi::AnyBuffer latent, ffi::AnyBuffer rope, ffi::Buffer<ffi::S32> slots,
                             ffi::Result<ffi::AnyBuffer> out) {
  AppendParams p{};
  if (ffi::Error error = read_pool(cache, p.pool); error.failure()) return error;
  FFI_CHECK(out->size_bytes() == cache.size_bytes(), "append: the result must be as large as the cache");
  p.pool.data = out->untyped_data();
  const auto type = latent.element_type();
  FFI_CHECK(type == ffi::BF16 || type == ffi::F16 || type == ffi::F32, "append: latent must be bfloat16, float16 or float32");
  FFI_CHECK(rope.element_type() == type, "append: rope must have latent's dtype");
  const auto ld = latent.dimensions(), rd = rope.dimensions();
  FFI_CHECK(ld.size() == 2 && ld[1] == p.pool.latent && rd.size() == 2 && rd[0] == ld[0] && rd[1] == 64, "append: latent [t, d_latent], rope [t, 64]");
  FFI_CHECK(ld[0] <= std::numeric_limits<int32_t>::max() && slots.element_count() == size_t(ld[0]), "append: slots [t], t below 2^31");
  FFI_LAUNCH(copy_unless_in_place(p.pool.data, cache.untyped_data(), cache.size_bytes(), stream));
  if (ld[0] == 0) return ffi::Error::Success();
  p.latent = latent.untyped_data();
  p.rope = rope.untyped_data();
  p.slots = slots.typed_data();
  p.tokens = int(ld[0]);
  p.dtype = type == ffi::BF16 ? Dtype::kBF16 : type == ffi::F16 ? Dtype::kF16 : Dtype::kF32;
  p.stream = stream;
  FFI_LAUNCH(run_append(p));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Append, AppendImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
