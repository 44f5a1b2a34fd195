// How kernels are launched, and what happens where that fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "table.h"

namespace nexus::cuda {

inline std::string described(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next call, somebody else's, would report it again
    throw std::runtime_error(std::string("nexus: ") + what + " failed: " + described(error));
  }
}

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace nexus::cuda
