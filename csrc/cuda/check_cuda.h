// Checks of what a CUDA op is given, and the views of tensors that its launcher takes.
//
// No code in this folder throws: nvcc's host compiler need not be the one that torch was built with, and an exception
// that crosses from one unwinder to the other ends the process. What is wrong is noted in a Status, the entry returns
// its two sentences, and Python raises (ops/csrc.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>
#include <cuda_runtime_api.h>

#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "activations.h"
#include "dtype.h"
#include "segments.h"

namespace mmpeft::cuda {

using OptionalTensor = std::optional<at::Tensor>;

// The first thing that is wrong with a call. The sentence names the op, what it expected and what came.
struct Status {
  const char* op = "";
  std::string refused;  // what the caller can mend: a ValueError
  std::string failed;   // what the machine refuses: a RuntimeError

  bool ok() const { return refused.empty() && failed.empty(); }

  template <typename... Parts>
  void refuse(const Parts&... parts) {
    if (ok()) refused = c10::str(op, ": ", parts...);
  }

  // Whether the launch succeeded.
  bool launched(cudaError_t result) {
    if (result != cudaSuccess && ok()) {
      failed = c10::str(op, ": expected the launch to succeed, got ", cudaGetErrorName(result), " (",
                        cudaGetErrorString(result), ")");
    }
    return result == cudaSuccess;
  }
};

// Notes what is wrong and leaves the function with an empty result.
#define MMPEFT_EXPECT(status, condition, ...) \
  do {                                        \
    if (!(condition)) {                       \
      (status).refuse(__VA_ARGS__);           \
      return {};                              \
    }                                         \
  } while (false)

inline int device_attribute(Status& status, cudaDeviceAttr attribute, int device) {
  int value = 0;
  status.launched(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Compute capability as one number (80, 90).
inline int architecture(Status& status, int device) {
  return 10 * device_attribute(status, cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(status, cudaDevAttrComputeCapabilityMinor, device);
}

inline DType dtype_of(Status& status, const char* name, at::ScalarType dtype) {
  MMPEFT_EXPECT(status, dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "expected ", name,
                " in float32, float16 or bfloat16, got ", dtype);
  return dtype == at::kFloat ? DType::kFloat32 : dtype == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

// The dtype that the matrix instructions of an op work in.
inline DType half_dtype_of(Status& status, const char* name, const at::Tensor& tensor) {
  MMPEFT_EXPECT(status, tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16, "expected ", name,
                " in float16 or bfloat16, got ", tensor.scalar_type());
  return dtype_of(status, name, tensor.scalar_type());
}

// Whether it is on a GPU, the one of `like`, dense, of these sizes and with unit column stride.
inline bool check_cuda_tensor(Status& status, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                              const at::Tensor& like) {
  MMPEFT_EXPECT(status, tensor.is_cuda() && tensor.device() == like.device(), "expected ", name,
                " on a GPU, with x on ", like.device(), ", got ", tensor.device());
  MMPEFT_EXPECT(status, tensor.layout() == at::kStrided, "expected a dense ", name, ", got layout ", tensor.layout());
  MMPEFT_EXPECT(status, tensor.sizes() == sizes, "expected ", name, " of sizes ", sizes, ", got ", tensor.sizes());
  MMPEFT_EXPECT(status, sizes.empty() || sizes.back() <= 1 || tensor.stride(-1) == 1, "expected ", name,
                " with unit column stride, got strides ", tensor.strides());
  for (const int64_t size : sizes) {
    MMPEFT_EXPECT(status, size <= std::numeric_limits<int>::max() / 2, "expected sizes of ", name, " below 2^30, got ",
                  sizes);
  }
  return true;
}

// A matrix of the dtype of `like`; rows that are written must not overlap.
inline bool check_matrix(Status& status, const char* name, const at::Tensor& tensor, int64_t rows, int64_t cols,
                         const at::Tensor& like, bool is_written = false) {
  if (!check_cuda_tensor(status, name, tensor, {rows, cols}, like)) return false;
  MMPEFT_EXPECT(status, tensor.scalar_type() == like.scalar_type(), "expected ", name, " in ", like.scalar_type(),
                ", got ", tensor.scalar_type());
  MMPEFT_EXPECT(status, !is_written || rows <= 1 || tensor.stride(0) >= cols, "expected ", name,
                " without overlapping rows, got sizes ", tensor.sizes(), " and strides ", tensor.strides());
  return true;
}

// A vector or matrix of any float dtype; no data without a tensor.
inline FloatArray float_array(Status& status, const char* name, const OptionalTensor& tensor, at::IntArrayRef sizes,
                              const at::Tensor& like) {
  if (!tensor.has_value()) return {};
  if (!check_cuda_tensor(status, name, *tensor, sizes, like)) return {};
  return {tensor->const_data_ptr(), dtype_of(status, name, tensor->scalar_type()),
          sizes.size() == 2 ? tensor->stride(0) : 0};
}

inline SegmentTable segment_table(Status& status, at::IntArrayRef num_outs, at::IntArrayRef ranks, int64_t num_out,
                                  int64_t sum_of_ranks, int block_n) {
  MMPEFT_EXPECT(status, !num_outs.empty() && num_outs.size() <= kMaxSegments && num_outs.size() == ranks.size(),
                "expected 1 to ", kMaxSegments, " segments with a rank each, got columns ", num_outs, " and ranks ",
                ranks);
  int64_t columns = 0, all_ranks = 0;
  for (size_t i = 0; i < num_outs.size(); ++i) {
    MMPEFT_EXPECT(status, num_outs[i] > 0 && ranks[i] >= 0, "expected segments with columns and no negative ranks, ",
                  "got ", num_outs, " and ", ranks);
    columns += num_outs[i];
    all_ranks += ranks[i];
  }
  MMPEFT_EXPECT(status, columns == num_out && all_ranks == sum_of_ranks, "expected segments with ", num_out,
                " columns and rank ", sum_of_ranks, " in all, got columns ", num_outs, " and ranks ", ranks);
  SegmentTable table;
  for (size_t i = 0; i < num_outs.size(); ++i) {
    append_segment(table, static_cast<int>(num_outs[i]), static_cast<int>(ranks[i]), block_n);
  }
  return table;
}

inline Activation activation_of(Status& status, std::string_view name) {
  constexpr std::string_view kNames[] = {"identity", "tanh", "relu", "gelu", "silu"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  MMPEFT_EXPECT(status, false, "expected activation identity, tanh, relu, gelu or silu, got ", name);
}

}  // namespace mmpeft::cuda
