// Checks of what an op is given. Every error names the op, what it expected and what came, and is Python's ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>

namespace mmpeft {

#define MMPEFT_CHECK(op, condition, ...) TORCH_CHECK_VALUE(condition, op, ": ", __VA_ARGS__)

// A dense CPU tensor of these sizes and dtype whose last stride is one.
inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                         at::ScalarType dtype) {
  MMPEFT_CHECK(op, tensor.device().is_cpu(), "expected ", name, " on the CPU, got ", tensor.device());
  MMPEFT_CHECK(op, tensor.layout() == at::kStrided, "expected a dense ", name, ", got layout ", tensor.layout());
  MMPEFT_CHECK(op, tensor.scalar_type() == dtype, "expected ", name, " in ", dtype, ", got ", tensor.scalar_type());
  MMPEFT_CHECK(op, tensor.sizes() == sizes, "expected ", name, " of sizes ", sizes, ", got ", tensor.sizes());
  MMPEFT_CHECK(op, sizes.empty() || sizes.back() <= 1 || tensor.stride(-1) == 1, "expected ", name,
               " with unit column stride, got strides ", tensor.strides());
}

// The same for a tensor that is written: no element may be in it twice.
inline void check_output(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                         at::ScalarType dtype) {
  check_tensor(op, name, tensor, sizes, dtype);
  if (tensor.numel() == 0) return;
  // By growing stride each dimension has to step over everything that the ones before it reach.
  c10::SmallVector<std::pair<int64_t, int64_t>, 4> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    MMPEFT_CHECK(op, stride > reach, "expected ", name, " without overlapping elements, got sizes ", sizes,
                 " and strides ", tensor.strides());
    reach += stride * (size - 1);
  }
}

}  // namespace mmpeft
