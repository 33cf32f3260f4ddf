// What crosses the border between the torch entries and the kernels: element types, and the mark of shared functions.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMPEFT_HOST_DEVICE __host__ __device__
#else
#define MMPEFT_HOST_DEVICE
#endif

namespace mmpeft::cuda {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// A vector or matrix of any float dtype, with unit column stride; data is null where there is none.
struct FloatArray {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;  // elements between rows
};

template <typename Integer>
MMPEFT_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace mmpeft::cuda
