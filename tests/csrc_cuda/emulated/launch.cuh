// Stands in for csrc/cuda/launch.cuh.
#pragma once

namespace mmpeft::cuda {

template <typename Params>
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, int num_threads, int shared_bytes, cudaStream_t,
                          const Params& params) {
  emulated::run_grid(grid, num_threads, shared_bytes, [&] { kernel(params); });
  return cudaSuccess;
}

inline char* dynamic_shared() { return emulated::shared_memory(); }

}  // namespace mmpeft::cuda
