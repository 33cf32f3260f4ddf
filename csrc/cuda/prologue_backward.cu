// Backward of the prologue: the low-rank part of dh, the gradients of its inputs, and the residual's gradient added on
// the way. Sums over rows (dgain, dl) are partial sums of blocks of 16 rows, added in order by a second kernel.

#include <cuda_runtime.h>

#include "launch.cuh"
#include "prologue.h"
#include "prologue_rows.cuh"
#include "reduction.cuh"
#include "shared_layout.h"
#include "warp_mma.cuh"

namespace mmpeft::cuda {
namespace {

constexpr int kThreads = kPrologueThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockR = 64;  // ranks of one step of da D
constexpr int kBlockK = RowBlock<kPrologueRows>::kStepColumns;

struct SharedLayout {
  static constexpr int kFloats = kPrologueRows * (kBlockK + kChunk);   // the product, or terms of a sum over rows
  static constexpr int kDa = kPrologueRows * kTileStride<kBlockR>;     // elements
  static constexpr int kDown = kBlockR * kTileStride<kBlockK>;         // elements
  static constexpr int kBytes = kFloats * 4 + (kDa + kDown) * 2;
};
constexpr int kFloatStride = kBlockK + kChunk;

// da D of this block's rows and kBlockK columns from `col` on, through shared memory to the threads that own them.
template <typename Element>
__device__ Floats low_rank_product(const PrologueBackward& backward, const RowBlock<kPrologueRows>& block, int col) {
  const PrologueInput& input = backward.input;
  float* shared_product = reinterpret_cast<float*>(dynamic_shared());
  Element* shared_da = reinterpret_cast<Element*>(shared_product + SharedLayout::kFloats);
  Element* shared_down = shared_da + SharedLayout::kDa;
  const FloatArray da = {backward.da, TypeCode<Element>::value, backward.stride_da};
  constexpr int kWarpColumns = kBlockK / kWarps;
  const int warp_col = threadIdx.x / 32 * kWarpColumns, lane = threadIdx.x % 32;
  const LaneAddress a_lane = a_lane_address(lane), b_lane = b_lane_address(lane);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kPrologueRows;
  float acc[kWarpColumns / 8][4] = {};
  for (int rank = 0; rank < input.rank; rank += kBlockR) {
    stage_tile<Element, kPrologueRows, kBlockR, kThreads>(shared_da, da, first_row, rank, input.num_rows, input.rank);
    stage_tile<Element, kBlockR, kBlockK, kThreads>(shared_down, input.down, rank, col, input.rank, input.width);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kBlockR; r += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, shared_da + a_lane.row * kTileStride<kBlockR> + r + a_lane.col);
#pragma unroll
      for (int i = 0; i < kWarpColumns / 8; ++i) {
        uint32_t b[2];
        ldmatrix_x2_transposed(b,
                               shared_down + (r + b_lane.row) * kTileStride<kBlockK> + warp_col + i * 8 + b_lane.col);
        mma_16x8x16<Element>(acc[i], a, b);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kWarpColumns / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      shared_product[accumulator_row(lane, j) * kFloatStride + warp_col + i * 8 + accumulator_col(lane, j)] = acc[i][j];
    }
  }
  __syncthreads();
  Floats product;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    product.values[i] = shared_product[block.tile_row * kFloatStride + block.tile_col + i];
  }
  __syncthreads();
  return product;
}

// partial[col..] = the sum over the block's rows of the threads' terms, added in order.
__device__ inline void sum_over_block(const RowBlock<kPrologueRows>& block, const Floats& terms, float* partials,
                                      int col, int width) {
  float* shared_terms = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    shared_terms[block.tile_row * kFloatStride + block.tile_col + i] = terms.values[i];
  }
  __syncthreads();
  const int column = col + threadIdx.x;
  if (threadIdx.x < kBlockK && column < width) {
    float total = 0.0f;
    for (int row = 0; row < kPrologueRows; ++row) total += shared_terms[row * kFloatStride + threadIdx.x];
    partials[static_cast<int64_t>(blockIdx.x) * width + column] = total;
  }
  __syncthreads();
}

template <typename Element>
__device__ void add_chunk(Floats& sum, const void* matrix, int64_t stride, int64_t row, int col, int count) {
  if (matrix == nullptr) return;
  const Floats added = to_floats(load_row_chunk<Element>(matrix, stride, row, col, count));
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum.values[i] += added.values[i];
}

template <typename Element>
__device__ void store_row_chunk(void* matrix, int64_t stride, int64_t row, int col, const Floats& values, int count) {
  store_chunk(static_cast<Element*>(matrix) + row * stride + col, to_chunk<Element>(values), count);
}

// Gradients of gate and up from dh.
template <typename Element>
__device__ Floats swiglu_backward(const PrologueBackward& backward, const InputChunk<Element>& inputs, const Floats& dh,
                                  int64_t row, int col, int count) {
  const Floats gate = to_floats(inputs.x), up = to_floats(inputs.up);
  Floats dgate, dup;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float g = gate.values[i], s = sigmoid(g);
    dup.values[i] = dh.values[i] * rounded<Element>(g * s);
    dgate.values[i] = rounded<Element>(dh.values[i] * up.values[i]) * s * (1.0f + g * (1.0f - s));
  }
  if (backward.dup != nullptr) store_row_chunk<Element>(backward.dup, backward.stride_dup, row, col, dup, count);
  return dgate;
}

// With rows == 1 there is no low-rank part and no sum over rows.
template <typename Element, int rows>
__global__ void __launch_bounds__(kThreads) prologue_backward_kernel(const PrologueBackward backward) {
  const PrologueInput& input = backward.input;
  const RowBlock<rows> block;
  constexpr int kStep = RowBlock<rows>::kStepColumns;
  const bool is_norm = input.kind == PrologueKind::kRmsNorm;
  const float rstd = is_norm && block.row < input.num_rows ? backward.rstd[block.row] : 0.0f;
  const uint64_t seed = input.dropout.seed != nullptr ? static_cast<uint64_t>(*input.dropout.seed) : 0;
  const bool needs_inputs = input.kind != PrologueKind::kNone || backward.din_scale_partials != nullptr;

  // Phase 1: the whole dh, its sums over rows, and all of dx that needs no statistic of the row.
  float projection = 0.0f;
  for (int k = 0; k < input.width; k += kStep) {
    const int col = k + block.tile_col, count = block.count(input, col);
    Floats dh = to_floats(load_row_chunk<Element>(backward.dh, backward.stride_dh, block.row, col, count));
    InputChunk<Element> inputs = {};
    if (needs_inputs) inputs.load(input, block.row, col, count);
    if constexpr (rows == kPrologueRows) {
      if (backward.da != nullptr) {
        Floats product = low_rank_product<Element>(backward, block, k);
        if (input.dropout.seed != nullptr) drop(input.dropout, seed, product, block.row, col);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          dh.values[i] = rounded<Element>(dh.values[i] + product.values[i] * input.dropout.inverse_keep);
        }
      }
      if (backward.din_scale_partials != nullptr) {
        Floats terms = unscaled_h(input, inputs, rstd, col, count);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) terms.values[i] *= dh.values[i];
        sum_over_block(block, terms, backward.din_scale_partials, k, input.width);
      }
    }
    apply_in_scale<Element>(input, dh, col, count);
    if (is_norm) {
      const Floats x = to_floats(inputs.x);
      if constexpr (rows == kPrologueRows) {
        if (backward.dgain_partials != nullptr) {
          Floats terms;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) terms.values[i] = dh.values[i] * (x.values[i] * rstd);
          sum_over_block(block, terms, backward.dgain_partials, k, input.width);
        }
      }
      if (backward.dx != nullptr) {
        const Floats gain = load_floats(input.gain, col, count);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) projection += dh.values[i] * gain.values[i] * (x.values[i] * rstd);
        store_row_chunk<Element>(backward.dh, backward.stride_dh, block.row, col, dh, count);
      }
      continue;
    }
    if (input.kind == PrologueKind::kSwiGlu) {
      dh = swiglu_backward<Element>(backward, inputs, dh, block.row, col, count);
    }
    if (backward.dx != nullptr) {
      add_chunk<Element>(dh, backward.dresidual, backward.stride_dresidual, block.row, col, count);
      store_row_chunk<Element>(backward.dx, backward.stride_dx, block.row, col, dh, count);
    }
  }

  // Phase 2: what phase 1 left in dh (each thread reads back its own), minus its projection on the normalised row.
  if (!is_norm || backward.dx == nullptr) return;
  const float mean = sum_over_row<rows>(projection) / input.width;
  for (int col = block.tile_col; col < input.width; col += kStep) {
    const int count = block.count(input, col);
    const Floats x = to_floats(load_row_chunk<Element>(input.x, input.stride_x, block.row, col, count));
    const Floats gain = load_floats(input.gain, col, count);
    Floats dx = to_floats(load_row_chunk<Element>(backward.dh, backward.stride_dh, block.row, col, count));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dx.values[i] = (dx.values[i] * gain.values[i] - x.values[i] * rstd * mean) * rstd;
    }
    add_chunk<Element>(dx, backward.dresidual, backward.stride_dresidual, block.row, col, count);
    store_row_chunk<Element>(backward.dx, backward.stride_dx, block.row, col, dx, count);
  }
}

template <typename Element>
cudaError_t launch_typed(const PrologueBackward& backward, cudaStream_t stream) {
  const int num_rows = backward.input.num_rows;
  const bool has_sums = backward.dgain_partials != nullptr || backward.din_scale_partials != nullptr;
  if (backward.da != nullptr || has_sums) {
    return launch(prologue_backward_kernel<Element, kPrologueRows>, dim3(ceil_div(num_rows, kPrologueRows)), kThreads,
                  SharedLayout::kBytes, stream, backward);
  }
  return launch(prologue_backward_kernel<Element, 1>, dim3(num_rows), kThreads, 0, stream, backward);
}

}  // namespace

cudaError_t launch_prologue_backward(const PrologueBackward& backward, cudaStream_t stream) {
  const PrologueInput& input = backward.input;
  if (input.num_rows < 1 || input.width < 1 || input.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  cudaError_t status = input.dtype == DType::kFloat16 ? launch_typed<__half>(backward, stream)
                                                      : launch_typed<__nv_bfloat16>(backward, stream);
  const int num_blocks = ceil_div(input.num_rows, kPrologueRows);
  if (status == cudaSuccess && backward.dgain_partials != nullptr) {
    status = launch_sum_partials(
        {backward.dgain_partials, num_blocks, input.width, 1.0f, backward.dgain, input.gain.dtype}, stream);
  }
  if (status == cudaSuccess && backward.din_scale_partials != nullptr) {
    status = launch_sum_partials(
        {backward.din_scale_partials, num_blocks, input.width, 1.0f, backward.din_scale, input.in_scale.dtype}, stream);
  }
  return status;
}

}  // namespace mmpeft::cuda
