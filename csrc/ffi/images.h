// The machine code of a kernel, as XLA wants it to record a launch: it loads kernels by itself.
#pragma once

#include <cstddef>

namespace jax_flashmla {

struct Image {
  const void* data = nullptr;  // a fat binary; nullptr: not found
  size_t bytes = 0;
  const char* name = nullptr;  // of the kernel in it
};

Image image_of(const void* kernel);  // as cudaLaunchKernel takes it

}  // namespace jax_flashmla
