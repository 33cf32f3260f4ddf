#include "csrc/cpu/entry.h"

#include <cmath>
#include <cstring>

namespace mmpeft {

Dtype dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default:
      MMPEFT_CHECK(op, false, "expected ", name, " in Float, BFloat16 or Half, got ", tensor.scalar_type());
  }
}

ConstRows rows_of(const char* op, const char* name, const OptionalTensor& tensor, int64_t num_rows, int64_t width,
                  at::ScalarType dtype) {
  if (!tensor) return {};
  check_tensor(op, name, *tensor, {num_rows, width}, dtype);
  return {tensor->const_data_ptr(), tensor->stride(0)};
}

Rows rows_to_write(const char* op, const char* name, const OptionalTensor& tensor, int64_t num_rows, int64_t width,
                   at::ScalarType dtype) {
  if (!tensor) return {};
  check_output(op, name, *tensor, {num_rows, width}, dtype);
  return {tensor->mutable_data_ptr(), tensor->stride(0)};
}

std::vector<float> floats_of(const char* op, const char* name, const OptionalTensor& tensor, int64_t size) {
  if (!tensor) return {};
  MMPEFT_CHECK(op, tensor->device().is_cpu() && at::isFloatingType(tensor->scalar_type()), "expected ", name,
               " as floats on the CPU, got ", tensor->scalar_type(), " on ", tensor->device());
  MMPEFT_CHECK(op, tensor->dim() == 1 && tensor->size(0) == size, "expected ", name, " of sizes [", size, "], got ",
               tensor->sizes());
  const at::Tensor wide = tensor->to(at::kFloat).contiguous();
  const float* values = wide.const_data_ptr<float>();
  return std::vector<float>(values, values + size);
}

Dropout dropout_of(const char* op, const OptionalTensor& seed, int64_t stream, double p) {
  if (!seed) return {};
  check_tensor(op, "seed", *seed, {}, at::kLong);
  const double lanes = std::nearbyint(p * 65536);
  MMPEFT_CHECK(op, lanes > 0 && lanes < 65536, "expected a dropout probability between 2^-17 and 1 - 2^-17, got ", p);
  MMPEFT_CHECK(op, stream >= 0 && stream <= UINT32_MAX, "expected a stream of 0 to 2^32 - 1, got ", stream);
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), static_cast<uint32_t>(stream),
          static_cast<int32_t>(lanes) - 32768};
}

void add_in_order(const float* partials, int64_t count, int64_t size, float* out) {
  std::memset(out, 0, size * sizeof(float));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < size; ++k) out[k] += partials[i * size + k];
}

}  // namespace mmpeft
