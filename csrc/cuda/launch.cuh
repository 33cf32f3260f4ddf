// One way to launch a kernel that takes a parameter struct: every return code comes back to the caller.
#pragma once

#include <cuda_runtime.h>

namespace mmpeft::cuda {

template <typename Params>
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, int num_threads, int shared_bytes, cudaStream_t stream,
                          const Params& params) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, num_threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

// The block's dynamic shared memory.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

}  // namespace mmpeft::cuda
