#include "kernels/gather.h"

#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/pool.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

static ffi::Error GatherImpl(Stream stream, ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> block_table, ffi::Buffer<ffi::S32> cache_seqlens,
                             ffi::Result<ffi::AnyBuffer> out) {
  GatherParams p{};
  if (ffi::Error error = read_pool(cache, p.pool); error.failure()) return error;
  constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
  const auto table = block_table.dimensions(), lens = cache_seqlens.dimensions(), od = out->dimensions();
  FFI_CHECK(table.size() == 3 && lens.size() == 2 && od.size() == 3, "gather: block_table [n, b, max_pages], cache_seqlens [n, b], out [n, total, d_qk]");
  FFI_CHECK(lens[0] == table[0] && lens[1] == table[1] && od[0] == table[0] && od[2] == p.pool.latent + 64,
            "gather: block_table [n, b, max_pages], cache_seqlens [n, b], out [n, total, d_qk]");
  FFI_CHECK(out->element_type() == (p.pool.dtype == Dtype::kF16 ? ffi::F16 : ffi::BF16), "gather: out must be bfloat16, or float16 for a float16 cache");
  // A table of no sequence may be as wide as it likes; sums over 256 sequences start below 2^31.
  FFI_CHECK(table[1] <= kIntMax - 256 && table[2] <= kIntMax && od[1] <= kIntMax - 64, "gather: b, max_pages and total must be below 2^31");
  if (od[0] == 0 || od[1] == 0) return ffi::Error::Success();
  FFI_CHECK(od[0] <= kIntMax / ((od[1] - 1) / 8 + 1), "gather: too many rows for a grid");
  p.block_table = block_table.typed_data();
  p.cache_seqlens = cache_seqlens.typed_data();
  p.out = out->untyped_data();
  p.n = int(od[0]), p.b = int(table[1]), p.max_pages = int(table[2]), p.total = int(od[1]);
  p.stream = stream;
  FFI_LAUNCH(run_gather(p));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Gather, GatherImpl,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>(),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
