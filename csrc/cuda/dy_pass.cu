// One read of dy gives da and dU of all segments, by mma.sync; sm_80 and newer. A block owns a column tile and a chunk
// of rows: U stays in shared memory and dU in registers, dy and z pass through. Partial sums over column tiles (da) and
// chunks (dU) are added in order by two small kernels: no atomics.

#include <cuda_runtime.h>

#include "activations.cuh"
#include "dy_pass.h"
#include "element.cuh"
#include "launch.cuh"
#include "reduction.cuh"
#include "shared_layout.h"
#include "warp_mma.cuh"

namespace mmpeft::cuda {
namespace {

constexpr int kBlockM = kDyPassBlockM;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <int block_n, int block_r>
struct SharedLayout {
  static constexpr int kDy = kBlockM * kTileStride<block_n>;  // elements of one of two stages
  static constexpr int kU = block_n * kTileStride<block_r>;
  static constexpr int kZ = kBlockM * kTileStride<block_r>;
  static constexpr int kBytes = (2 * kDy + kU + kZ) * 2;
};

// A block's [kBlockM, block_r] of a, in registers: loaded a step ahead, activated on its way to shared memory.
template <typename Element, int block_r>
struct RankTile {
  static constexpr int kChunksARow = block_r / kChunk;
  static constexpr int kChunks = ceil_div(kBlockM * kChunksARow, kThreads);
  Chunk<Element> chunks[kChunks];

  __device__ void load(const Element* a, int64_t stride, int row, int end_row, int first_rank, int end_rank) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + threadIdx.x;
      const int64_t tile_row = row + index / kChunksARow;
      const int rank = first_rank + index % kChunksARow * kChunk;
      chunks[i] = load_chunk(a + tile_row * stride + rank, tile_row < end_row ? end_rank - rank : 0);
    }
  }

  __device__ void store_activated(Element* shared, Activation activation) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + threadIdx.x;
      if (index >= kBlockM * kChunksARow) break;
      Chunk<Element> z = chunks[i];
      if (activation != Activation::kIdentity) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          z.values[j] = from_float<Element>(activate(activation, to_float(z.values[j])));
        }
      }
      Element* target = shared + index / kChunksARow * kTileStride<block_r> + index % kChunksARow * kChunk;
      *reinterpret_cast<Chunk<Element>*>(target) = z;
    }
  }
};

// This column tile's partial dz = dy U of kBlockM rows. Four warps share the rows, two the ranks.
template <typename Element, int block_n, int block_r>
__device__ void multiply_dz(const Element* dy, const Element* u, float* dz, int row, int end_row, int rank,
                            int num_ranks, int width) {
  constexpr int kWarpRanks = block_r / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % 4 * 16, warp_rank = warp / 4 * kWarpRanks;
  const LaneAddress a_lane = a_lane_address(lane), b_lane = b_lane_address(lane);
  float acc[kWarpRanks / 8][4] = {};
#pragma unroll 4
  for (int n = 0; n < block_n; n += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, dy + (warp_row + a_lane.row) * kTileStride<block_n> + n + a_lane.col);
#pragma unroll
    for (int i = 0; i < kWarpRanks / 8; ++i) {
      uint32_t b[2];
      ldmatrix_x2_transposed(b, u + (n + b_lane.row) * kTileStride<block_r> + warp_rank + i * 8 + b_lane.col);
      mma_16x8x16<Element>(acc[i], a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < kWarpRanks / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t tile_row = row + warp_row + accumulator_row(lane, j);
      const int tile_rank = rank + warp_rank + i * 8 + accumulator_col(lane, j);
      if (tile_row < end_row && tile_rank < num_ranks) dz[tile_row * width + tile_rank] = acc[i][j];
    }
  }
}

// du += dy^T z of kBlockM rows. Each warp owns block_n / 8 columns of dy and all ranks.
template <typename Element, int block_n, int block_r>
__device__ void multiply_du(const Element* dy, const Element* z, float (&du)[block_n / kWarps / 16][block_r / 8][4]) {
  constexpr int kWarpColumns = block_n / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const LaneAddress a_lane = a_transposed_lane_address(lane), b_lane = b_lane_address(lane);
#pragma unroll
  for (int m = 0; m < kBlockM; m += 16) {
    uint32_t a[kWarpColumns / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpColumns / 16; ++i) {
      const int column = warp * kWarpColumns + i * 16 + a_lane.col;
      ldmatrix_x4_transposed(a[i], dy + (m + a_lane.row) * kTileStride<block_n> + column);
    }
#pragma unroll
    for (int j = 0; j < block_r / 8; ++j) {
      uint32_t b[2];
      ldmatrix_x2_transposed(b, z + (m + b_lane.row) * kTileStride<block_r> + j * 8 + b_lane.col);
#pragma unroll
      for (int i = 0; i < kWarpColumns / 16; ++i) mma_16x8x16<Element>(du[i][j], a[i], b);
    }
  }
}

template <typename Element, int block_n, int block_r>
__global__ void __launch_bounds__(kThreads) dy_pass_kernel(const DyPass pass) {
  using Layout = SharedLayout<block_n, block_r>;
  Element* shared_dy = reinterpret_cast<Element*>(dynamic_shared());
  Element* shared_u = shared_dy + 2 * Layout::kDy;
  Element* shared_z = shared_u + Layout::kU;
  const int tile_n = blockIdx.x, chunk = blockIdx.y, rank = blockIdx.z * block_r;
  const Segment& segment = pass.segments.segments[segment_of_tile(pass.segments, tile_n)];
  const int column = first_column_of_tile(segment, tile_n, block_n);
  const FloatArray dy = {pass.dy, TypeCode<Element>::value, pass.stride_dy};
  const Element* a = static_cast<const Element*>(pass.a) + segment.first_rank;
  const int start = chunk * pass.rows_per_chunk;
  const int64_t chunk_end = static_cast<int64_t>(start) + pass.rows_per_chunk;
  // A segment without these ranks has no rows to visit.
  const int end = rank >= segment.num_ranks ? start
                                            : static_cast<int>(chunk_end < pass.num_rows ? chunk_end : pass.num_rows);
  float du[block_n / kWarps / 16][block_r / 8][4] = {};

  // Phase 1: the rows of this chunk, one step ahead in dy and a.
  if (start < end) {
    RankTile<Element, block_r> rank_tile;
    stage_tile<Element, block_n, block_r, kThreads>(shared_u, pass.u, column, rank, segment.end_column,
                                                    segment.num_ranks);
    stage_tile<Element, kBlockM, block_n, kThreads>(shared_dy, dy, start, column, end, segment.end_column);
    cp_async_commit();
    rank_tile.load(a, pass.stride_a, start, end, rank, segment.num_ranks);
    for (int row = start, stage = 0; row < end; row += kBlockM, stage ^= 1) {
      rank_tile.store_activated(shared_z, pass.activation);
      const int next = row + kBlockM;
      if (next < end) {
        stage_tile<Element, kBlockM, block_n, kThreads>(shared_dy + (stage ^ 1) * Layout::kDy, dy, next, column, end,
                                                        segment.end_column);
        rank_tile.load(a, pass.stride_a, next, end, rank, segment.num_ranks);
      }
      cp_async_commit();
      cp_async_wait<1>();  // all but the group just committed: this step's dy is there
      __syncthreads();
      const Element* dy_tile = shared_dy + stage * Layout::kDy;
      if (pass.dz_partials != nullptr) {
        float* dz = pass.dz_partials + static_cast<int64_t>(tile_n) * pass.num_rows * pass.width;
        multiply_dz<Element, block_n, block_r>(dy_tile, shared_u, dz, row, end, rank, segment.num_ranks, pass.width);
      }
      if (pass.du_partials != nullptr) multiply_du<Element, block_n, block_r>(dy_tile, shared_z, du);
      __syncthreads();
    }
  }

  // Phase 2: this chunk's share of dU; ranks that the segment does not have get zeros.
  if (pass.du_partials == nullptr) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* partial = pass.du_partials + static_cast<int64_t>(chunk) * pass.num_out * pass.width;
#pragma unroll
  for (int i = 0; i < block_n / kWarps / 16; ++i) {
#pragma unroll
    for (int j = 0; j < block_r / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t tile_column = column + warp * (block_n / kWarps) + i * 16 + accumulator_row(lane, k);
        const int tile_rank = rank + j * 8 + accumulator_col(lane, k);
        if (tile_column < segment.end_column && tile_rank < pass.width) {
          partial[tile_column * pass.width + tile_rank] = du[i][j][k];
        }
      }
    }
  }
}

// da = s f'(a) times the sum of a segment's partials, one thread an element.
template <typename Element>
__global__ void __launch_bounds__(kThreads) da_kernel(const DyPass pass) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / pass.sum_of_ranks;
  const int column = static_cast<int>(index % pass.sum_of_ranks);
  if (row >= pass.num_rows) return;
  int segment_idx = 0;
  while (column >= pass.segments.segments[segment_idx].first_rank + pass.segments.segments[segment_idx].num_ranks) {
    ++segment_idx;
  }
  const Segment& segment = pass.segments.segments[segment_idx];
  float dz = 0.0f;
  for (int64_t tile = segment.first_tile; tile < segment.end_tile; ++tile) {
    dz += pass.dz_partials[(tile * pass.num_rows + row) * pass.width + column - segment.first_rank];
  }
  float da = rounded<Element>(dz * pass.scaling);
  if (pass.activation != Activation::kIdentity) {
    const float a = to_float(static_cast<const Element*>(pass.a)[row * pass.stride_a + column]);
    da *= activation_derivative(pass.activation, a);
  }
  static_cast<Element*>(pass.da)[index] = from_float<Element>(da);
}

template <typename Element, int block_n, int block_r>
cudaError_t launch_pass(const DyPass& pass, cudaStream_t stream) {
  const dim3 grid(pass.segments.num_tiles, ceil_div(pass.num_rows, pass.rows_per_chunk), ceil_div(pass.width, block_r));
  return launch(dy_pass_kernel<Element, block_n, block_r>, grid, kThreads, SharedLayout<block_n, block_r>::kBytes,
                stream, pass);
}

template <typename Element>
cudaError_t launch_typed(const DyPass& pass, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  if (pass.tile.block_n == 256 && pass.tile.block_r == 16) status = launch_pass<Element, 256, 16>(pass, stream);
  if (pass.tile.block_n == 256 && pass.tile.block_r == 32) status = launch_pass<Element, 256, 32>(pass, stream);
  if (pass.tile.block_n == 128 && pass.tile.block_r == 64) status = launch_pass<Element, 128, 64>(pass, stream);
  if (pass.tile.block_n == 128 && pass.tile.block_r == 128) status = launch_pass<Element, 128, 128>(pass, stream);
  if (status == cudaSuccess && pass.dz_partials != nullptr && pass.sum_of_ranks > 0) {
    const int64_t size = static_cast<int64_t>(pass.num_rows) * pass.sum_of_ranks;
    const int num_blocks = static_cast<int>(ceil_div(size, int64_t{kThreads}));
    status = launch(da_kernel<Element>, dim3(num_blocks), kThreads, 0, stream, pass);
  }
  if (status == cudaSuccess && pass.du_partials != nullptr) {
    const int num_chunks = ceil_div(pass.num_rows, pass.rows_per_chunk);
    const int64_t size = static_cast<int64_t>(pass.num_out) * pass.width;
    status = launch_sum_partials({pass.du_partials, num_chunks, size, pass.scaling, pass.du, pass.u.dtype}, stream);
  }
  return status;
}

}  // namespace

cudaError_t launch_dy_pass(const DyPass& pass, cudaStream_t stream) {
  const bool empty = pass.num_rows < 1 || pass.num_out < 1 || pass.width < 1 || pass.rows_per_chunk < 1;
  if (empty || pass.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  return pass.dtype == DType::kFloat16 ? launch_typed<__half>(pass, stream)
                                       : launch_typed<__nv_bfloat16>(pass, stream);
}

}  // namespace mmpeft::cuda
