// Forward of the prologue: one pass over x (two for rms_norm, the second from cache), the shrink from registers.

#include <cuda_runtime.h>

#include "launch.cuh"
#include "prologue.h"
#include "prologue_rows.cuh"
#include "shared_layout.h"
#include "warp_mma.cuh"

namespace mmpeft::cuda {
namespace {

constexpr int kThreads = kPrologueThreads;
constexpr int kWarps = kThreads / 32;

template <int block_r>
struct SharedLayout {
  static constexpr int kBlockK = RowBlock<kPrologueRows>::kStepColumns;
  static constexpr int kH = kPrologueRows * kTileStride<kBlockK>;  // elements
  static constexpr int kDown = block_r * kTileStride<kBlockK>;     // of one of two stages
  static constexpr int kBytes = block_r == 0 ? 0 : (kH + 2 * kDown) * 2;
};

// acc += h D^T over one step. Each warp owns block_r / 8 ranks of all rows.
template <typename Element, int block_r>
__device__ void multiply_step(const Element* h, const Element* down, float (&acc)[block_r / kWarps / 8][4]) {
  constexpr int kBlockK = SharedLayout<block_r>::kBlockK;
  const int warp_rank = threadIdx.x / 32 * (block_r / kWarps), lane = threadIdx.x % 32;
  const LaneAddress a_lane = a_lane_address(lane), b_lane = b_transposed_lane_address(lane);
#pragma unroll
  for (int k = 0; k < kBlockK; k += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, h + a_lane.row * kTileStride<kBlockK> + k + a_lane.col);
#pragma unroll
    for (int i = 0; i < block_r / kWarps / 8; ++i) {
      uint32_t b[2];
      ldmatrix_x2(b, down + (warp_rank + i * 8 + b_lane.row) * kTileStride<kBlockK> + k + b_lane.col);
      mma_16x8x16<Element>(acc[i], a, b);
    }
  }
}

// block_r is 0 without a shrink.
template <typename Element, int rows, int block_r>
__global__ void __launch_bounds__(kThreads) prologue_kernel(const Prologue prologue) {
  static_assert(block_r == 0 || rows == kPrologueRows, "a matrix instruction has 16 rows");
  using Layout = SharedLayout<block_r>;
  const PrologueInput& input = prologue.input;
  const RowBlock<rows> block;
  const int first_rank = blockIdx.y * block_r;
  const bool writes_rows = blockIdx.y == 0;
  constexpr int kStep = RowBlock<rows>::kStepColumns;

  // Phase 1: the row statistic.
  float rstd = 0.0f;
  if (input.kind == PrologueKind::kRmsNorm) {
    if (prologue.given_rstd != nullptr) {
      if (block.row < input.num_rows) rstd = prologue.given_rstd[block.row];
    } else {
      float squares = 0.0f;
      for (int col = block.tile_col; col < input.width; col += kStep) {
        const Floats x =
            to_floats(load_row_chunk<Element>(input.x, input.stride_x, block.row, col, block.count(input, col)));
#pragma unroll
        for (int i = 0; i < kChunk; ++i) squares += x.values[i] * x.values[i];
      }
      rstd = rsqrtf(sum_over_row<rows>(squares) / input.width + prologue.eps);
    }
    const bool first_of_row = block.tile_col == 0 && block.row < input.num_rows;
    if (prologue.rstd != nullptr && writes_rows && first_of_row) prologue.rstd[block.row] = rstd;
  }

  // Phase 2: h, and its product with the stacked down projections; x and D are a step ahead.
  [[maybe_unused]] Element* shared_h = nullptr;
  [[maybe_unused]] Element* shared_down = nullptr;
  [[maybe_unused]] float acc[block_r == 0 ? 1 : block_r / kWarps / 8][4] = {};
  const int end_rank = input.rank;
  InputChunk<Element> next;
  next.load(input, block.row, block.tile_col, block.count(input, block.tile_col));
  if constexpr (block_r > 0) {
    shared_h = reinterpret_cast<Element*>(dynamic_shared());
    shared_down = shared_h + Layout::kH;
    stage_tile<Element, block_r, kStep, kThreads>(shared_down, input.down, first_rank, 0, end_rank, input.width);
    cp_async_commit();
  }
  const uint64_t seed = input.dropout.seed != nullptr ? static_cast<uint64_t>(*input.dropout.seed) : 0;
  for (int k = 0, stage = 0; k < input.width; k += kStep, stage ^= 1) {
    const int col = k + block.tile_col, count = block.count(input, col);
    const InputChunk<Element> current = next;
    if (k + kStep < input.width) {
      next.load(input, block.row, col + kStep, block.count(input, col + kStep));
      if constexpr (block_r > 0) {
        stage_tile<Element, block_r, kStep, kThreads>(shared_down + (stage ^ 1) * Layout::kDown, input.down, first_rank,
                                                      k + kStep, end_rank, input.width);
      }
    }
    Floats h = unscaled_h(input, current, rstd, col, count);
    apply_in_scale<Element>(input, h, col, count);
    if (prologue.h != nullptr && writes_rows) {
      store_chunk(static_cast<Element*>(prologue.h) + block.row * input.width + col, to_chunk<Element>(h), count);
    }
    if constexpr (block_r > 0) {
      cp_async_commit();
      if (input.dropout.seed != nullptr) drop(input.dropout, seed, h, block.row, col);
      *reinterpret_cast<Chunk<Element>*>(shared_h + block.tile_row * kTileStride<kStep> + block.tile_col) =
          to_chunk<Element>(h);
      cp_async_wait<1>();  // all but the group just committed: this step's D is there
      __syncthreads();
      multiply_step<Element, block_r>(shared_h, shared_down + stage * Layout::kDown, acc);
      __syncthreads();
    }
  }

  // Phase 3: what the up projections and the backward need.
  if constexpr (block_r > 0) {
    const int warp_rank = first_rank + threadIdx.x / 32 * (block_r / kWarps), lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < block_r / kWarps / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = static_cast<int64_t>(blockIdx.x) * rows + accumulator_row(lane, j);
        const int rank = warp_rank + i * 8 + accumulator_col(lane, j);
        if (row >= input.num_rows || rank >= end_rank) continue;
        const Element a = from_float<Element>(acc[i][j] * input.dropout.inverse_keep);
        static_cast<Element*>(prologue.a)[row * end_rank + rank] = a;
        if (prologue.z == nullptr) continue;
        static_cast<Element*>(prologue.z)[row * end_rank + rank] =
            from_float<Element>(activate(prologue.activation, to_float(a)));
      }
    }
  }
}

template <typename Element, int rows, int block_r>
cudaError_t launch_with(const Prologue& prologue, cudaStream_t stream) {
  const PrologueInput& input = prologue.input;
  const dim3 grid(ceil_div(input.num_rows, rows), block_r == 0 ? 1 : ceil_div(input.rank, block_r == 0 ? 1 : block_r));
  return launch(prologue_kernel<Element, rows, block_r>, grid, kThreads, SharedLayout<block_r>::kBytes, stream,
                prologue);
}

template <typename Element>
cudaError_t launch_typed(const Prologue& prologue, cudaStream_t stream) {
  if (prologue.input.rank == 0) return launch_with<Element, 1, 0>(prologue, stream);
  if (prologue.input.rank <= 64) return launch_with<Element, kPrologueRows, 64>(prologue, stream);
  return launch_with<Element, kPrologueRows, 128>(prologue, stream);
}

}  // namespace

cudaError_t launch_prologue(const Prologue& prologue, cudaStream_t stream) {
  const PrologueInput& input = prologue.input;
  if (input.num_rows < 1 || input.width < 1 || input.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  return input.dtype == DType::kFloat16 ? launch_typed<__half>(prologue, stream)
                                        : launch_typed<__nv_bfloat16>(prologue, stream);
}

}  // namespace mmpeft::cuda
