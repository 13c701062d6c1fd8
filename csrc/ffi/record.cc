// XLA puts what a handler launches on a stream into its command buffer (a CUDA graph) as a graph of its own, and nothing around it may overlap with it. What
// a handler records are kernels like XLA's own: each may start while the one before it ends ("programmatic dependent launch"; every kernel here waits by
// itself for its predecessors, and XLA's do). That is worth up to 1.5 us a call.
//
// The stage is younger than the FFI headers that this package is built with, so the part of its C interface that is used is declared here. It is under
// development; its version is checked twice: by jax_flashmla/_native.py, which registers the stage only where the installed jaxlib has this version, and below.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ffi/handlers.h"
#include "ffi/images.h"
#include "hopper/recording.h"

namespace jax_flashmla {
namespace {

// ---- XLA's interface, version 0.1 -----------------------------------------------------------------------------------------------------------------

constexpr int64_t kRecordExtension = 128;
constexpr int kMajor = 0, kMinor = 1;

struct Extension {
  size_t struct_size;
  int64_t type;
  int32_t major, minor;
  const Extension* next;
};
struct FindExtensionArgs {
  size_t struct_size;
  void* extension_start;
  void* context;
  int64_t type;
  const Extension* found;
};
struct RegisterArgs {
  size_t struct_size;
  void* extension_start;
  XLA_FFI_ByteSpan name, platform;
  XLA_FFI_Handler *instantiate, *prepare, *initialize, *execute, *record;
  XLA_FFI_Handler_Traits traits;
};
struct Api {
  XLA_FFI_Api old;  // up to what the headers know
  XLA_FFI_Error* (*find_extension)(FindExtensionArgs*);
};

struct Command;
struct Dim3 {
  int32_t x, y, z;
};
struct LaunchDims {
  Dim3 grid, block, cluster;  // cluster: zeros where there is none
};
struct KernelArg {
  const void* address;
  int64_t size;
  int type;  // 1: a value of the host, which is copied
};
struct KernelArgs {
  const KernelArg* args;
  int64_t count;
};
struct RecordApi {
  XLA_FFI_Error* (*create_launch)(void* context, const char* name, const void* image, int64_t image_bytes, int format, LaunchDims dims, uint32_t smem,
                                  int32_t programmatic, const KernelArgs* args, const Command* const* after, uint32_t after_count, const Command** command);
  XLA_FFI_Error* (*update_launch)(void* context, const Command* command, const KernelArgs* args);
  void *create_copy, *update_copy;
  XLA_FFI_Error* (*request_stream_capture)(void* context);
};
constexpr int kHostValue = 1, kCubin = 1;
enum class Action : int { kCreate, kUpdate };
struct Frame {
  void* context;
  const RecordApi* api;
  Action action;
  const Command** commands;
  int64_t* num_commands;
  int64_t max_commands;
};
struct RecordExtension {
  Extension base;
  Frame* frame;
};

// ---------------------------------------------------------------------------------------------------------------------------------------------------

XLA_FFI_Error* failure(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  return api->XLA_FFI_Error_Create(&args);
}

XLA_FFI_ByteSpan span(const char* text) { return {text, std::strlen(text)}; }
Dim3 to_dim3(const dim3& d) { return {int32_t(d.x), int32_t(d.y), int32_t(d.z)}; }

}  // namespace

XLA_FFI_Error* record(XLA_FFI_CallFrame* frame, XLA_FFI_Handler* execute) {
  if (frame->extension_start) return execute(frame);  // asks for metadata, which are the same
  const auto* api = reinterpret_cast<const Api*>(frame->api);
  FindExtensionArgs query{sizeof(query), nullptr, frame->ctx, kRecordExtension, nullptr};
  if (api->old.struct_size >= sizeof(Api)) {
    if (XLA_FFI_Error* error = api->find_extension(&query)) return error;
  }
  const Extension* found = query.found;
  if (!found || found->major != kMajor || found->minor != kMinor) return failure(&api->old, "jax_flashmla: this XLA records in another way than version 0.1");
  const Frame& to = *reinterpret_cast<const RecordExtension*>(found)->frame;

  Recording own;
  const auto stage = frame->stage;
  recording = &own, frame->stage = XLA_FFI_ExecutionStage_EXECUTE;
  XLA_FFI_Error* error = execute(frame);
  recording = nullptr, frame->stage = stage;
  if (error) return error;
  // Of two kernels both would get an edge from what is before the call, and no chain: captured, they are one. And a call that launches nothing has no command
  // for others to wait for.
  if (own.incomplete || own.launches.size() != 1) return to.api->request_stream_capture(to.context);

  const Launch& launch = own.launches.front();
  std::vector<KernelArg> args;
  for (const std::string& bytes : launch.args) args.push_back({bytes.data(), int64_t(bytes.size()), kHostValue});
  const KernelArgs all{args.data(), int64_t(args.size())};
  if (to.action == Action::kUpdate) return to.api->update_launch(to.context, to.commands[0], &all);  // the same launch; buffers have moved
  const Image image = image_of(launch.kernel);
  if (!image.data) return failure(&api->old, "jax_flashmla: the machine code of a kernel was not found");
  const Dim3 cluster = launch.cluster > 1 ? Dim3{launch.cluster, 1, 1} : Dim3{};
  const LaunchDims dims{to_dim3(launch.grid), to_dim3(launch.block), cluster};
  error = to.api->create_launch(to.context, image.name, image.data, int64_t(image.bytes), kCubin, dims, uint32_t(launch.smem), true, &all, nullptr, 0,
                                &to.commands[0]);
  if (!error) *to.num_commands = 1;
  return error;
}

XLA_FFI_Error* RegisterTargets(XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start) return failure(frame->api, "jax_flashmla.targets is not to be called");
  for (const Target& target : kTargets) {
    RegisterArgs args{};
    args.struct_size = sizeof(args);
    args.name = span(target.name), args.platform = span("CUDA");
    args.execute = target.execute, args.record = target.record;
    args.traits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
    auto* known = reinterpret_cast<XLA_FFI_Handler_Register_Args*>(&args);
    if (XLA_FFI_Error* error = frame->api->XLA_FFI_Handler_Register(known)) return error;
  }
  return Schedule(frame);  // whose metadata are as good as any
}

}  // namespace jax_flashmla
