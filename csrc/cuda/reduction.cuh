// Second half of every split sum: partial sums added in order, so that results repeat bit by bit.
#pragma once

#include "element.cuh"
#include "launch.cuh"

namespace mmpeft::cuda {

struct SumPartials {
  const float* partials;  // [num_partials, size]
  int num_partials;
  int64_t size;
  float scaling;
  void* out;  // [size]
  DType dtype;
};

constexpr int kSumThreads = 256;

static __global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const SumPartials sum) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= sum.size) return;
  float total = 0.0f;
  for (int i = 0; i < sum.num_partials; ++i) total += sum.partials[i * sum.size + index];
  store_float(sum.out, sum.dtype, index, total * sum.scaling);
}

// out = scaling * the sum of the partials.
inline cudaError_t launch_sum_partials(const SumPartials& sum, cudaStream_t stream) {
  if (sum.size == 0) return cudaSuccess;
  const int num_blocks = static_cast<int>(ceil_div(sum.size, int64_t{kSumThreads}));
  return launch(sum_partials_kernel, dim3(num_blocks), kSumThreads, 0, stream, sum);
}

}  // namespace mmpeft::cuda
