// Where a thread's launches go while XLA builds a command buffer of kernels (csrc/ffi/record.cc): into a list, and not to their stream.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <string>
#include <vector>

namespace jax_flashmla {

struct Launch {
  const void* kernel;  // as cudaLaunchKernel takes it
  dim3 grid, block;
  size_t smem;
  int cluster;                    // CTAs, along x
  std::vector<std::string> args;  // the bytes of each
};
struct Recording {
  std::vector<Launch> launches;
  bool incomplete = false;  // the call does something else as well: it is to be captured
};

inline thread_local Recording* recording = nullptr;

}  // namespace jax_flashmla
