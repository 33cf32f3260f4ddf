// How a block of 256 threads goes over rows eight elements at a time, and what both directions compute from them.
#pragma once

#include "activations.cuh"
#include "element.cuh"
#include "philox.h"
#include "prologue.h"

namespace mmpeft::cuda {

constexpr int kPrologueThreads = 256;

// A block of `rows` rows: 256 / rows threads side by side on each, so that a step covers kStepColumns columns.
template <int rows>
struct RowBlock {
  static constexpr int kThreadsARow = kPrologueThreads / rows;
  static constexpr int kStepColumns = kThreadsARow * kChunk;

  int tile_row = threadIdx.x / kThreadsARow;
  int tile_col = threadIdx.x % kThreadsARow * kChunk;
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows + tile_row;

  // Elements that this thread has at `col` of its row: 8, fewer at the end of the row, none beyond the matrix.
  __device__ int count(const PrologueInput& input, int col) const {
    return row < input.num_rows ? input.width - col : 0;
  }
};

// Sum of `value` over the threads of a row, the same in all of them. All threads of the block call it.
template <int rows>
__device__ inline float sum_over_row(float value) {
  constexpr int kThreadsARow = kPrologueThreads / rows;
  constexpr int kLanes = kThreadsARow < 32 ? kThreadsARow : 32;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if constexpr (kThreadsARow > 32) {
    static_assert(rows == 1, "rows are whole blocks or parts of a warp");
    constexpr int kWarps = kPrologueThreads / 32;
    __shared__ float warp_sums[kWarps];
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
    for (int i = 0; i < kWarps; ++i) value += warp_sums[i];
  }
  return value;
}

template <typename Element>
__device__ inline Chunk<Element> load_row_chunk(const void* matrix, int64_t stride, int64_t row, int col, int count) {
  return load_chunk(static_cast<const Element*>(matrix) + row * stride + col, count);
}

// The inputs of eight elements of h, loaded before they are needed.
template <typename Element>
struct InputChunk {
  Chunk<Element> x, up;

  __device__ void load(const PrologueInput& input, int64_t row, int col, int count) {
    x = load_row_chunk<Element>(input.x, input.stride_x, row, col, count);
    if (input.kind == PrologueKind::kSwiGlu) {
      up = load_row_chunk<Element>(input.up, input.stride_up, row, col, count);
    }
  }
};

// h before its input scale: values of Element, in float32.
template <typename Element>
__device__ inline Floats unscaled_h(const PrologueInput& input, const InputChunk<Element>& chunk, float rstd, int col,
                                    int count) {
  Floats h = to_floats(chunk.x);
  if (input.kind == PrologueKind::kRmsNorm) {
    const Floats gain = load_floats(input.gain, col, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      h.values[i] = rounded<Element>(rounded<Element>(h.values[i] * rstd) * gain.values[i]);
    }
  } else if (input.kind == PrologueKind::kSwiGlu) {
    const Floats up = to_floats(chunk.up);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      h.values[i] = rounded<Element>(rounded<Element>(h.values[i] * sigmoid(h.values[i])) * up.values[i]);
    }
  }
  return h;
}

// Multiplies by the input scale, where there is one, and rounds.
template <typename Element>
__device__ inline void apply_in_scale(const PrologueInput& input, Floats& h, int col, int count) {
  if (input.in_scale.data == nullptr) return;
  const Floats scale = load_floats(input.in_scale, col, count);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) h.values[i] = rounded<Element>(h.values[i] * scale.values[i]);
}

// Zeroes the dropped ones of eight elements; `col` is a multiple of 8.
__device__ inline void drop(const Dropout& dropout, uint64_t seed, Floats& values, int64_t row, int col) {
  const DropoutLanes lanes = dropout_lanes(seed, dropout.stream, static_cast<int>(row), col / kChunk);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (is_dropped(lanes, i, dropout.threshold)) values.values[i] = 0.0f;
  }
}

}  // namespace mmpeft::cuda
