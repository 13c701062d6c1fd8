#include "kernels/sparse_prefill.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/pool.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// The planner takes so many query tokens at once only: there are n plans, of `chunk` sequences each, and a launch for each of them.
static ffi::Error SparsePrefillImpl(Stream stream, ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::Buffer<ffi::S32> indices, ffi::Buffer<ffi::S32> topk_length,
                                    ffi::Buffer<ffi::F32> attn_sink, ffi::Buffer<ffi::S32> cache_seqlens, ffi::Buffer<ffi::S32> metadata,
                                    ffi::Buffer<ffi::S32> num_splits, ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> max_logits,
                                    ffi::ResultBuffer<ffi::F32> lse, ffi::ResultBuffer<ffi::F16> partial_out, ffi::ResultBuffer<ffi::F32> partial_stats,
                                    ffi::ResultBuffer<ffi::F32> partial_max, float softmax_scale) {
  const auto qd = q.dimensions(), id = indices.dimensions(), lens = cache_seqlens.dimensions(), meta = metadata.dimensions(),
             partial = partial_out->dimensions();
  const bool equal = cache_seqlens.element_count() == 0;  // all lists count in full
  FFI_CHECK(qd.size() == 3 && id.size() == 3 && (equal || lens.size() == 2) && meta.size() == 3 && partial.size() == 4,
            "sparse_prefill: q [s_q, h_q, d_qk], indices [s_q, h_kv, topk], cache_seqlens [n, chunk] or nothing, metadata [n, parts, 8]");
  const int64_t s_q = qd[0], h_q = qd[1], d_qk = qd[2], h_kv = id[1], n = meta[0], parts = meta[1], slots = partial[0];
  if (s_q == 0 || h_q == 0) return ffi::Error::Success();
  FFI_CHECK(id[0] == s_q && h_kv >= 1 && h_q % h_kv == 0 && id[2] <= kIntMax - kBlockTokens,
            "sparse_prefill: indices [s_q, h_kv, topk], h_q a multiple of h_kv");
  const int64_t tokens = s_q * h_kv, group = h_q / h_kv, chunk = equal ? tokens : lens[1];
  FFI_CHECK(tokens <= kIntMax - 1 && group <= 65536 && (d_qk == 576 || d_qk == 512), "sparse_prefill: d_qk must be 576 or 512, h_q / h_kv 65536 at most");
  FFI_CHECK(q.element_type() == ffi::BF16 && out->element_type() == ffi::BF16, "sparse_prefill: q and out must be bfloat16");
  FFI_CHECK(n >= 1 && chunk >= 1 && n * chunk >= tokens && (n - 1) * chunk < tokens && (equal || lens[0] == n),
            "sparse_prefill: cache_seqlens [n, chunk] of all s_q * h_kv, or nothing and one plan");
  FFI_CHECK(num_splits.element_count() == 0 || num_splits.element_count() == size_t(n * (chunk + 1)), "sparse_prefill: num_splits [n, chunk + 1], or nothing");
  FFI_CHECK(!equal || topk_length.element_count() == 0, "sparse_prefill: topk_length goes with cache_seqlens");
  FFI_CHECK(chunk % h_kv == 0, "sparse_prefill: a plan is of whole tokens");
  FFI_CHECK(parts >= 1 && parts <= 65535 && meta[2] == kMetadataWidth, "sparse_prefill: tile_scheduler_metadata [n, num_parts <= 65535, 8]");
  FFI_CHECK(topk_length.element_count() == 0 || topk_length.element_count() == size_t(tokens), "sparse_prefill: topk_length [s_q * h_kv] or nothing");
  FFI_CHECK(attn_sink.element_count() == 0 || attn_sink.element_count() == size_t(h_q), "sparse_prefill: attn_sink [h_q] or nothing");
  FFI_CHECK(out->element_count() == size_t(s_q * h_q * kDv) && lse->element_count() == size_t(s_q * h_q) && max_logits->element_count() == size_t(s_q * h_q),
            "sparse_prefill: out [s_q, h_q, 512], max_logits and lse [s_q, h_q]");
  FFI_CHECK(
      slots >= 1 && partial[1] == 1 && partial[2] == (group + 15) / 16 * 16 && partial[3] == kDv &&
          partial_stats->element_count() == size_t(4 * slots * group) && partial_max->element_count() == size_t(slots * group),
      "sparse_prefill: partial_out [slots, 1, h_q / h_kv rounded up to 16, 512], partial_stats [slots, 1, h_q / h_kv, 4], partial_max [slots, h_q / h_kv]");
  KVPool pool;
  if (ffi::Error error = read_pool(kv, pool); error.failure()) return error;
  FFI_CHECK(pool.format != KVFormat::kFp8V4 && pool.dtype == Dtype::kBF16 && pool.latent + 64 == d_qk,
            "sparse_prefill: kv must be bfloat16 or fp8_v32, as wide as q");

  SparsePrefillParams p{};
  p.partial_out = partial_out->untyped_data();
  p.partial_stats = partial_stats->untyped_data();
  p.partial_max = partial_max->typed_data();
  p.s_q = 1, p.h_q = int(group), p.h_kv = 1, p.group = int(group), p.rows = int(group), p.heads_kv = int(h_kv), p.tokens = 1;
  p.d_qk = int(d_qk), p.max_len = int(equal ? id[2] : kIntMax - kBlockTokens);
  p.num_parts = int(parts), p.slots = int(slots);
  p.softmax_scale = softmax_scale;
  p.dtype = Dtype::kBF16, p.format = pool.format;
  p.stream = stream;
  p.attn_sink = data_or_null(attn_sink);
  SparseSource& source = p.sources[0];
  source.cache = pool.data;
  source.page_size = pool.page_size, source.page_bytes = pool.page_bytes, source.slots = int64_t(pool.num_pages) * pool.page_size;
  source.topk = int(id[2]);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = i * chunk;
    p.b = int(std::min(chunk, tokens - first));
    p.q = static_cast<const uint16_t*>(q.untyped_data()) + first * group * d_qk;
    p.out = static_cast<uint16_t*>(out->untyped_data()) + first * group * kDv;
    p.lse = lse->typed_data() + first * group;
    p.max_logits = max_logits->typed_data() + first * group;
    p.cache_seqlens = data_or_null(cache_seqlens, first);
    p.metadata = reinterpret_cast<const Part*>(metadata.typed_data()) + i * parts;
    p.num_splits = data_or_null(num_splits, i * (chunk + 1));
    source.indices = indices.typed_data() + first * id[2];
    source.topk_length = data_or_null(topk_length, first);
    FFI_LAUNCH(run_sparse_prefill(p));
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparsePrefill, SparsePrefillImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("softmax_scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
