// What the torch entries of the row kernels share: checked views of tensors, float copies of vectors, parallel rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "csrc/check.h"
#include "csrc/cpu/kernels.h"

namespace mmpeft {

using OptionalTensor = std::optional<at::Tensor>;

// The index of an activations' dtype in the kernel tables.
Dtype dtype_of(const char* op, const char* name, const at::Tensor& tensor);

// Checked [M, K] arrays; null without a tensor.
ConstRows rows_of(const char* op, const char* name, const OptionalTensor& tensor, int64_t num_rows, int64_t width,
                  at::ScalarType dtype);
Rows rows_to_write(const char* op, const char* name, const OptionalTensor& tensor, int64_t num_rows, int64_t width,
                   at::ScalarType dtype);

// A float32 copy of a vector of any float dtype; empty without a tensor.
std::vector<float> floats_of(const char* op, const char* name, const OptionalTensor& tensor, int64_t size);
inline const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// No dropout without a seed.
Dropout dropout_of(const char* op, const OptionalTensor& seed, int64_t stream, double p);

// Elements that are worth a thread of their own.
constexpr int64_t kGrainElements = 16384;

// Runs range(begin, end) over all rows of `width` elements, on several threads.
template <typename Range>
void parallel_rows(int64_t num_rows, int64_t width, const Range& range) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
  at::parallel_for(0, num_rows, grain, range);
}

// Sums over rows repeat bit by bit for any number of threads: they are formed in this many blocks of rows, which
// depends on the number of rows alone, and the blocks are added in order.
constexpr int64_t kMaxSumBlocks = 32, kMinSumRows = 16;
struct SumBlocks {
  int64_t rows_per_block, count;
  explicit SumBlocks(int64_t num_rows, int64_t most_blocks = kMaxSumBlocks, int64_t fewest_rows = kMinSumRows)
      : rows_per_block(std::max(fewest_rows, (num_rows + most_blocks - 1) / most_blocks)),
        count((num_rows + rows_per_block - 1) / rows_per_block) {}
};

// Adds `count` partial sums [size] in order into `out`.
void add_in_order(const float* partials, int64_t count, int64_t size, float* out);

}  // namespace mmpeft
