// What nvcc's start-up code hands to the CUDA runtime, fat binaries and the kernels in them, passes through here: the linker is told to wrap the two
// functions (CMakeLists.txt). The runtime itself does not give machine code back.
#include "ffi/images.h"

#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <unordered_map>

namespace jax_flashmla {
namespace {

// CUDA's fatbinary_section.h and fatbinary.h: what a module registers, and how its data begin.
struct FatWrapper {
  int magic, version;
  const void* data;
  void* unused;
};
constexpr uint32_t kWrapperMagic = 0x466243B1, kFatMagic = 0xBA55ED50;
struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // behind the header
};

struct Images {
  std::unordered_map<void**, const FatWrapper*> modules;
  std::unordered_map<const void*, Image> kernels;
};
Images& images() {  // filled before anything else of this library runs
  static Images all;
  return all;
}

void add(void** module, const char* host_function, const char* name) {
  const auto found = images().modules.find(module);
  if (found == images().modules.end() || found->second->magic != int(kWrapperMagic)) return;
  const void* data = found->second->data;
  FatHeader header;
  std::memcpy(&header, data, sizeof(header));
  if (header.magic == kFatMagic) images().kernels[host_function] = {data, size_t(header.header_bytes + header.bytes), name};
}

}  // namespace

Image image_of(const void* kernel) {
  const auto found = images().kernels.find(kernel);
  return found == images().kernels.end() ? Image{} : found->second;
}

extern "C" {
void** __real___cudaRegisterFatBinary(void* wrapper);
void __real___cudaRegisterFunction(void** module, const char* host_function, char* device_function, const char* name, int thread_limit, uint3*, uint3*, dim3*,
                                   dim3*, int*);

void** __wrap___cudaRegisterFatBinary(void* wrapper) {
  void** module = __real___cudaRegisterFatBinary(wrapper);
  images().modules[module] = static_cast<const FatWrapper*>(wrapper);
  return module;
}

void __wrap___cudaRegisterFunction(void** module, const char* host_function, char* device_function, const char* name, int thread_limit, uint3* tid, uint3* bid,
                                   dim3* block, dim3* grid, int* warp_size) {
  add(module, host_function, name);
  __real___cudaRegisterFunction(module, host_function, device_function, name, thread_limit, tid, bid, block, grid, warp_size);
}
}

}  // namespace jax_flashmla
