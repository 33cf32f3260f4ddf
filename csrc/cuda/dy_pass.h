// What the branches of a stacked weight need from dy, for all segments in one pass over it:
//   a = D drop(h), z = f(a):   da = s (dy_i U_i) * f'(a)  [M, R],   dU_i = s dy_i^T z  [N, R]
// Semantics of kernels/mmpeft_kernels/dy_pass.py.
#pragma once

#include <cuda_runtime_api.h>

#include "activations.h"
#include "segments.h"

namespace mmpeft::cuda {

// Sizes of a launch: a block owns block_n columns and a chunk of rows, and goes through it block_m rows at a time.
struct DyPassTile {
  int block_n, block_r;  // block_r ranks at once; beyond it dy is read once more for each block
};

constexpr int kDyPassBlockM = 64;

constexpr DyPassTile dy_pass_tile(int largest_rank) {
  if (largest_rank <= 16) return {256, 16};
  if (largest_rank <= 32) return {256, 32};
  if (largest_rank <= 64) return {128, 64};
  return {128, 128};
}

// Rows of a chunk, a multiple of kDyPassBlockM: as few chunks as give every multiprocessor two blocks, since each chunk
// costs a partial sum of dU.
constexpr int dy_pass_rows_per_chunk(int num_rows, int num_blocks_a_chunk, int num_multiprocessors) {
  const int wanted = ceil_div(2 * num_multiprocessors, num_blocks_a_chunk);
  const int most = ceil_div(num_rows, kDyPassBlockM);
  const int num_chunks = wanted < most ? wanted : most;
  return ceil_div(ceil_div(num_rows, num_chunks), kDyPassBlockM) * kDyPassBlockM;
}

struct DyPass {
  DType dtype;  // of dy, a and da: kFloat16 or kBFloat16
  const void* dy;  // [M, N]
  const void* a;   // [M, sum of ranks]
  FloatArray u;    // [N, R], R at least the largest rank
  int64_t stride_dy, stride_a;
  int num_rows, num_out;
  int sum_of_ranks, width;  // width is R
  SegmentTable segments;    // made with the tile's block_n
  DyPassTile tile;
  int rows_per_chunk;
  Activation activation;
  float scaling;
  float* dz_partials;  // [segments.num_tiles, M, R], or null where da is not wanted
  float* du_partials;  // [chunks, N, R], or null where dU is not wanted
  void* da;            // [M, sum of ranks], contiguous
  void* du;            // [N, R], contiguous, in u's dtype
};

// M, N and R >= 1. Columns of dU beyond a segment's rank become 0.
cudaError_t launch_dy_pass(const DyPass& pass, cudaStream_t stream);

}  // namespace mmpeft::cuda
