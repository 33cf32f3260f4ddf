// The low-rank GEMM for Hopper: out = (s z U + x W (+ bias)) (* scale) (+ residual), accumulated in float32.
// Semantics of kernels/mmpeft_kernels/lowrank_gemm.py.
#pragma once

#include <cuda_runtime_api.h>

#include "segments.h"

namespace mmpeft::cuda {

// Row-major with unit column stride, in the GEMM's dtype; data and stride are multiples of 16 bytes.
struct Matrix {
  void* data = nullptr;
  int rows = 0, cols = 0;
  int64_t stride = 0;  // elements between rows
};

struct LowRankGemm {
  DType dtype;      // kFloat16 or kBFloat16
  bool transposed;  // weight is [N, K] and u is [N, R] (forward); else weight is [K, N] and u is [R, N] (dx)
  float scaling;
  Matrix x;             // [M, K], K >= 1
  Matrix weight;
  Matrix z, u;          // [M, sum of ranks] and u; data is null without a low-rank part
  FloatArray bias;      // [N], or no data
  FloatArray scale;     // [N], or no data
  Matrix residual;      // [M, N], or no data; may be out itself
  Matrix out;           // [M, N], M and N >= 1
  SegmentTable segments;  // columns and ranks; made with block_n
  int block_n;            // 128 or 256
  int num_programs;       // persistent blocks, normally one a multiprocessor
};

// Granularity of a store: all segments but the last have a multiple of it as columns.
constexpr int kStoreColumns = 64;

// The widest tile that still gives every multiprocessor one.
constexpr int lowrank_gemm_block_n(int num_rows, int num_out, int num_multiprocessors) {
  constexpr int kBlockM = 128, kWide = 256, kNarrow = 128;
  const int num_wide_tiles = ceil_div(num_rows, kBlockM) * ceil_div(num_out, kWide);
  return num_out > kNarrow && num_wide_tiles >= num_multiprocessors ? kWide : kNarrow;
}

// Returns cudaErrorInvalidValue or cudaErrorMisalignedAddress for operands that TMA cannot take, cudaErrorNotSupported
// where the driver has no tensor maps, else the launch's own code.
cudaError_t launch_lowrank_gemm_sm90(const LowRankGemm& gemm, cudaStream_t stream);

}  // namespace mmpeft::cuda
