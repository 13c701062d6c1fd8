#include "kernels/sparse_decode.h"

#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/pool.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// A pool and the list of entries in it; an operand that is not used has no elements.
static ffi::Error set_source(SparseSource& source, const SparseDecodeParams& p, ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> indices,
                             ffi::Buffer<ffi::S32> topk_length) {
  KVPool pool;
  if (ffi::Error error = read_pool(cache, pool); error.failure()) return error;
  FFI_CHECK(pool.format == p.format && (pool.format != KVFormat::kPlain || pool.latent + 64 == p.d_qk), "sparse_decode: the width of k_cache");
  const auto id = indices.dimensions();
  FFI_CHECK(id.size() == 3 && id[0] * id[1] == p.b && id[1] == p.tokens && id[2] <= kIntMax - kBlockTokens, "sparse_decode: indices [b, s_q, topk]");
  FFI_CHECK(topk_length.element_count() == 0 || topk_length.element_count() == size_t(p.b), "sparse_decode: topk_length [b * s_q] or nothing");
  source.cache = pool.data;
  source.page_size = pool.page_size, source.page_bytes = pool.page_bytes, source.slots = int64_t(pool.num_pages) * pool.page_size;
  source.indices = indices.typed_data();
  source.topk_length = data_or_null(topk_length);
  source.topk = int(id[2]);
  return ffi::Error::Success();
}

static ffi::Error SparseDecodeImpl(Stream stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::Buffer<ffi::S32> indices, ffi::Buffer<ffi::S32> topk_length,
                                   ffi::Buffer<ffi::F32> attn_sink, ffi::AnyBuffer extra_k_cache, ffi::Buffer<ffi::S32> extra_indices,
                                   ffi::Buffer<ffi::S32> extra_topk_length, ffi::Buffer<ffi::S32> cache_seqlens, ffi::Buffer<ffi::S32> metadata,
                                   ffi::Buffer<ffi::S32> num_splits, ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> lse,
                                   ffi::ResultBuffer<ffi::F16> partial_out, ffi::ResultBuffer<ffi::F32> partial_stats, float softmax_scale) {
  const auto qd = q.dimensions(), meta = metadata.dimensions(), partial = partial_out->dimensions();
  FFI_CHECK(qd.size() == 4 && meta.size() == 2 && partial.size() == 4, "sparse_decode: q [b, s_q, h_q, d_qk], metadata [parts, 8]");
  const int64_t b = qd[0] * qd[1], s_q = qd[1], h_q = qd[2], d_qk = qd[3], parts = meta[0], slots = partial[0];
  if (b == 0 || h_q == 0) return ffi::Error::Success();
  FFI_CHECK(b <= kIntMax - 1 && h_q <= 65536 && (d_qk == 576 || d_qk == 512), "sparse_decode: d_qk must be 576 or 512, h_q 65536 at most");
  const auto cached = k_cache.element_type();
  const bool fp8 = cached == ffi::U8 || cached == ffi::F8E4M3FN;
  FFI_CHECK(q.element_type() == ffi::BF16 || (q.element_type() == ffi::F16 && !fp8), "sparse_decode: q must be bfloat16, or float16 over a float16 cache");
  FFI_CHECK(out->element_type() == q.element_type() && (fp8 || cached == q.element_type()), "sparse_decode: q, out and a plain k_cache have one dtype");
  const bool equal = cache_seqlens.element_count() == 0;  // all lists count in full
  FFI_CHECK(equal ? topk_length.element_count() + extra_topk_length.element_count() == 0 : cache_seqlens.element_count() == size_t(b),
            "sparse_decode: cache_seqlens [b * s_q], or nothing without topk_length");
  FFI_CHECK(num_splits.element_count() == 0 || num_splits.element_count() == size_t(b + 1), "sparse_decode: num_splits [b * s_q + 1], or nothing");
  FFI_CHECK(parts >= 1 && parts <= 65535 && meta[1] == kMetadataWidth, "sparse_decode: tile_scheduler_metadata [num_parts <= 65535, 8]");
  FFI_CHECK(attn_sink.element_count() == 0 || attn_sink.element_count() == size_t(h_q), "sparse_decode: attn_sink [h_q] or nothing");
  FFI_CHECK(out->element_count() == size_t(b * h_q * kDv) && lse->element_count() == size_t(b * h_q),
            "sparse_decode: out [b, s_q, h_q, 512], lse [b, h_q, s_q]");
  FFI_CHECK(
      slots >= 1 && partial[1] == 1 && partial[2] == (h_q + 15) / 16 * 16 && partial[3] == kDv && partial_stats->element_count() == size_t(4 * slots * h_q),
      "sparse_decode: partial_out [slots, 1, h_q rounded up to 16, 512], partial_stats [slots, 1, h_q, 4]");
  SparseDecodeParams p{};
  p.q = q.untyped_data();
  p.cache_seqlens = data_or_null(cache_seqlens);
  p.metadata = reinterpret_cast<const Part*>(metadata.typed_data());
  p.num_splits = data_or_null(num_splits);
  p.out = out->untyped_data();
  p.lse = lse->typed_data();
  p.partial_out = partial_out->untyped_data();
  p.partial_stats = partial_stats->untyped_data();
  p.b = int(b), p.s_q = 1, p.h_q = int(h_q), p.h_kv = 1, p.group = int(h_q), p.rows = int(h_q);
  p.d_qk = int(d_qk), p.max_len = int(kIntMax - kBlockTokens);
  p.num_parts = int(parts), p.slots = int(slots);
  p.softmax_scale = softmax_scale;
  p.dtype = q.element_type() == ffi::BF16 ? Dtype::kBF16 : Dtype::kF16;
  p.stream = stream;
  p.attn_sink = data_or_null(attn_sink);
  p.tokens = int(s_q);
  p.format = !fp8 ? KVFormat::kPlain : d_qk == 576 ? KVFormat::kFp8V32 : KVFormat::kFp8V4;
  if (ffi::Error error = set_source(p.sources[0], p, k_cache, indices, topk_length); error.failure()) return error;
  if (extra_k_cache.element_count()) {
    FFI_CHECK(extra_k_cache.element_type() == cached, "sparse_decode: extra_k_cache has k_cache's dtype");
    if (ffi::Error error = set_source(p.sources[1], p, extra_k_cache, extra_indices, extra_topk_length); error.failure()) return error;
  }
  if (equal) {
    const int64_t keys = (int64_t(p.sources[0].topk) + kBlockTokens - 1) / kBlockTokens * kBlockTokens + p.sources[1].topk;
    FFI_CHECK(keys <= p.max_len, "sparse_decode: two lists of 2^31 entries at most");
    p.max_len = int(keys);
  }
  FFI_LAUNCH(run_sparse_decode(p));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparseDecode, SparseDecodeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("softmax_scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
