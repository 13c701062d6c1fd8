#include "splitkv/schedule.h"

#include "ffi/check.h"
#include "ffi/handlers.h"

namespace jax_flashmla {
namespace ffi = xla::ffi;

static ffi::Error ScheduleImpl(Stream stream, ffi::Buffer<ffi::S32> cache_seqlens, ffi::ResultBuffer<ffi::S32> metadata, ffi::ResultBuffer<ffi::S32> num_splits,
                               int32_t row_tiles, bool batch_invariant, bool lists) {
  const auto lens = cache_seqlens.dimensions(), meta = metadata->dimensions(), splits = num_splits->dimensions();
  FFI_CHECK(lens.size() == 2 && meta.size() == 3 && splits.size() == 2, "schedule: cache_seqlens [n, b], metadata [n, parts, 8], num_splits [n, b + 1]");
  FFI_CHECK(meta[0] == lens[0] && splits[0] == lens[0], "schedule: all operands need the same leading size");
  FFI_CHECK(meta[1] >= 1 && meta[2] == kMetadataWidth && splits[1] == lens[1] + 1, "schedule: metadata [n, parts, 8], num_splits [n, b + 1]");
  FFI_CHECK(!batch_invariant || meta[1] == kMaxInvariantSplits * lens[1], "schedule: a batch-invariant plan has 16 parts per sequence");
  if (lens[0] == 0) return ffi::Error::Success();
  FFI_CHECK(lens[1] >= 1 && (batch_invariant || lens[1] <= max_schedule_batch(int(meta[1]))), "schedule: b is larger than the planner's shared memory");
  ScheduleParams p{};
  p.cache_seqlens = cache_seqlens.typed_data();
  p.metadata = reinterpret_cast<Part*>(metadata->typed_data());
  p.num_splits = num_splits->typed_data();
  p.n = int(lens[0]), p.b = int(lens[1]), p.num_parts = int(meta[1]);
  p.row_tiles = row_tiles, p.batch_invariant = batch_invariant, p.lists = lists;
  p.stream = stream;
  FFI_LAUNCH(run_schedule(p));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Schedule, ScheduleImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("row_tiles")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("lists"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
