#include "kernels/dense_decode.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/in_place.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

struct Results {
  void *out, *partial_out, *partial_stats;
  float* lse;
};

// Attention and combine may be calls of their own (jax_flashmla/ops/dense_decode.py says when). The one that combines takes the results of the other one as
// further operands. Out and lse are complete but for sequences that were split, and its own are to be the same buffers.
static ffi::Error find_results(Results& to, Phase phase, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> lse,
                               ffi::ResultBuffer<ffi::F16> partial_out, ffi::ResultBuffer<ffi::F32> partial_stats, Stream stream) {
  to = {out->untyped_data(), partial_out->untyped_data(), partial_stats->untyped_data(), lse->typed_data()};
  FFI_CHECK(phase == Phase::kAll || phase == Phase::kAttend || phase == Phase::kCombine, "dense_decode: phase 0, 1 or 2");
  FFI_CHECK(rest.size() == (phase == Phase::kCombine ? 4 : 0), "dense_decode: the results of attention are operands of combine, and of nothing else");
  if (phase != Phase::kCombine) return ffi::Error::Success();
  const size_t bytes[4] = {out->size_bytes(), lse->size_bytes(), partial_out->size_bytes(), partial_stats->size_bytes()};
  void* left[4];
  for (size_t i = 0; i < 4; ++i) {
    const auto operand = rest.get<ffi::AnyBuffer>(i);
    FFI_CHECK(operand.has_value() && operand->size_bytes() == bytes[i], "dense_decode: combine has the results of attention as operands");
    left[i] = operand->untyped_data();
  }
  to.partial_out = left[2], to.partial_stats = left[3];
  FFI_LAUNCH(copy_unless_in_place(to.out, left[0], bytes[0], stream));
  FFI_LAUNCH(copy_unless_in_place(to.lse, left[1], bytes[1], stream));
  return ffi::Error::Success();
}

static ffi::Error DenseDecodeImpl(Stream stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::Buffer<ffi::S32> block_table,
                                  ffi::Buffer<ffi::S32> cache_seqlens, ffi::Buffer<ffi::S32> metadata, ffi::Buffer<ffi::S32> num_splits,
                                  ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> lse,
                                  ffi::ResultBuffer<ffi::F16> partial_out, ffi::ResultBuffer<ffi::F32> partial_stats, float softmax_scale, bool causal,
                                  int32_t phase) {
  const auto qd = q.dimensions(), kd = k_cache.dimensions(), table = block_table.dimensions(), meta = metadata.dimensions();
  const auto partial = partial_out->dimensions();
  FFI_CHECK(qd.size() == 4 && kd.size() == 4 && table.size() == 2 && meta.size() == 2 && partial.size() == 4,
            "dense_decode: q [b, s_q, h_q, d_qk], k_cache [P, page_size, h_kv, d_qk], block_table [b, max_pages], metadata [parts, 8]");
  FFI_CHECK(
      (q.element_type() == ffi::BF16 || q.element_type() == ffi::F16) && k_cache.element_type() == q.element_type() && out->element_type() == q.element_type(),
      "dense_decode: q, k_cache and out must all be bfloat16 or all float16");
  const int64_t b = qd[0], s_q = qd[1], h_q = qd[2], d_qk = qd[3], page_size = kd[1], h_kv = kd[2];
  if (b == 0 || s_q == 0 || h_q == 0) return ffi::Error::Success();
  FFI_CHECK(h_kv >= 1 && h_q % h_kv == 0, "dense_decode: h_q must be a multiple of h_kv");
  const int64_t group = h_q / h_kv, rows = s_q * group, parts = meta[0], slots = partial[0];
  FFI_CHECK((d_qk == 576 || d_qk == 512) && kd[3] == d_qk, "dense_decode: d_qk must be 576 or 512, the same in q and k_cache");
  FFI_CHECK(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128 || page_size == 256, "dense_decode: page_size");
  FFI_CHECK(kd[0] >= 1 && kd[0] <= std::numeric_limits<int32_t>::max(), "dense_decode: the pool needs at least one page");
  FFI_CHECK(table[0] == b && table[1] >= 1, "dense_decode: block_table needs a row per sequence and at least one column");
  FFI_CHECK(cache_seqlens.element_count() == size_t(b) && num_splits.element_count() == size_t(b + 1), "dense_decode: cache_seqlens [b], num_splits [b + 1]");
  FFI_CHECK(parts >= 1 && parts <= 65535 && meta[1] == kMetadataWidth && h_kv <= 65535, "dense_decode: tile_scheduler_metadata [num_parts <= 65535, 8]");
  FFI_CHECK(rows * h_kv <= 8 * 65535, "dense_decode: s_q * h_q may be 524280 at most");
  FFI_CHECK(out->element_count() == size_t(b * s_q * h_q * kDv) && lse->element_count() == size_t(b * h_q * s_q),
            "dense_decode: out [b, s_q, h_q, 512], lse [b, h_q, s_q]");
  FFI_CHECK(slots >= 1 && partial[1] == h_kv && partial[2] == (rows + 15) / 16 * 16 && partial[3] == kDv &&
                partial_stats->element_count() == size_t(4 * slots * h_kv * rows),
            "dense_decode: partial_out [slots, h_kv, rows rounded up to 16, 512], partial_stats [slots, h_kv, rows, 4]");
  Results results;
  if (ffi::Error error = find_results(results, Phase(phase), rest, out, lse, partial_out, partial_stats, stream); error.failure()) return error;
  DenseDecodeParams p{};
  p.q = q.untyped_data();
  p.k_cache = k_cache.untyped_data();
  p.block_table = block_table.typed_data();
  p.cache_seqlens = cache_seqlens.typed_data();
  p.metadata = reinterpret_cast<const Part*>(metadata.typed_data());
  p.num_splits = num_splits.typed_data();
  p.out = results.out;
  p.lse = results.lse;
  p.partial_out = results.partial_out;
  p.partial_stats = results.partial_stats;
  p.b = int(b), p.s_q = int(s_q), p.h_q = int(h_q), p.h_kv = int(h_kv), p.group = int(group), p.rows = int(rows);
  p.d_qk = int(d_qk), p.num_pages = int(kd[0]), p.page_size = int(page_size), p.max_pages = int(table[1]);
  p.max_len = int(std::min<int64_t>(table[1] * page_size, std::numeric_limits<int32_t>::max() - kBlockTokens));
  p.num_parts = int(parts), p.slots = int(slots);
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = q.element_type() == ffi::BF16 ? Dtype::kBF16 : Dtype::kF16;
  p.stream = stream;
  FFI_LAUNCH(run_dense_decode(p, Phase(phase)));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseDecode, DenseDecodeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal")
                                  .Attr<int32_t>("phase"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
