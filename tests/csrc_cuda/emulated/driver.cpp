// Flat functions around the launchers for ctypes, and the parts of the CUDA runtime that the launchers call.
#include <cuda.h>

#include <cstdlib>
#include <vector>

#include "dy_pass.h"
#include "hopper.cuh"
#include "lowrank_gemm.h"

using namespace mmpeft::cuda;

namespace {

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && strides[0] > 0;
  const bool boxes = box[0] * 2 == 128 && box[1] <= 256 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (rank != 2 || !aligned || !boxes || sizes[0] == 0 || sizes[1] == 0) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap encoded = {static_cast<char*>(data), static_cast<int64_t>(sizes[0]), static_cast<int64_t>(sizes[1]),
                             static_cast<int64_t>(strides[0]), static_cast<int>(box[0]), static_cast<int>(box[1])};
  static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
  *reinterpret_cast<TensorMap*>(map) = encoded;
  return CUDA_SUCCESS;
}

SegmentTable segment_table(const int* num_outs, const int* ranks, int count, int block_n) {
  SegmentTable table;
  for (int i = 0; i < count; ++i) append_segment(table, num_outs[i], ranks[i], block_n);
  return table;
}

}  // namespace

extern "C" {

CUDAAPI cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long,
                                                     cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&encode_tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

struct Array {
  void* data;
  int dtype, rows, cols;
  int64_t stride;
};

static Matrix matrix(const Array& array) { return {array.data, array.rows, array.cols, array.stride}; }
static FloatArray floats(const Array& array) { return {array.data, static_cast<DType>(array.dtype), array.stride}; }

int run_lowrank_gemm(const Array* x, const Array* weight, const Array* z, const Array* u, const Array* bias,
                     const Array* scale, const Array* residual, const Array* out, const int* num_outs, const int* ranks,
                     int num_segments, int transposed, float scaling, int block_n, int num_programs) {
  LowRankGemm gemm = {};
  gemm.dtype = static_cast<DType>(x->dtype);
  gemm.transposed = transposed != 0;
  gemm.scaling = scaling;
  gemm.x = matrix(*x);
  gemm.weight = matrix(*weight);
  gemm.z = matrix(*z);
  gemm.u = matrix(*u);
  gemm.bias = floats(*bias);
  gemm.scale = floats(*scale);
  gemm.residual = matrix(*residual);
  gemm.out = matrix(*out);
  gemm.segments = segment_table(num_outs, ranks, num_segments, block_n);
  gemm.block_n = block_n;
  gemm.num_programs = num_programs;
  return launch_lowrank_gemm_sm90(gemm, nullptr);
}

int run_dy_pass(const Array* dy, const Array* a, const Array* u, const Array* da, const Array* du, const int* num_outs,
                const int* ranks, int num_segments, int block_r, int rows_per_chunk, int activation, float scaling) {
  DyPass pass = {};
  pass.dtype = static_cast<DType>(dy->dtype);
  pass.dy = dy->data;
  pass.a = a->data;
  pass.u = floats(*u);
  pass.stride_dy = dy->stride;
  pass.stride_a = a->stride;
  pass.num_rows = dy->rows;
  pass.num_out = dy->cols;
  pass.sum_of_ranks = a->cols;
  pass.width = u->cols;
  pass.tile = dy_pass_tile(block_r);
  pass.segments = segment_table(num_outs, ranks, num_segments, pass.tile.block_n);
  pass.rows_per_chunk = rows_per_chunk;
  pass.activation = static_cast<Activation>(activation);
  pass.scaling = scaling;
  std::vector<float> dz_partials(da->data ? size_t(pass.segments.num_tiles) * dy->rows * u->cols : 0, NAN);
  const int num_chunks = ceil_div(dy->rows, rows_per_chunk);
  std::vector<float> du_partials(du->data ? size_t(num_chunks) * dy->cols * u->cols : 0, NAN);
  pass.dz_partials = da->data ? dz_partials.data() : nullptr;
  pass.du_partials = du->data ? du_partials.data() : nullptr;
  pass.da = da->data;
  pass.du = du->data;
  return launch_dy_pass(pass, nullptr);
}

// How often each tile of a grid is visited when `num_programs` programs share it.
void count_grouped_tiles(int num_tiles_m, int num_tiles_n, int* visits) {
  for (int tile = 0; tile < num_tiles_m * num_tiles_n; ++tile) {
    const TilePosition position = grouped_tile(tile, num_tiles_m, num_tiles_n);
    ++visits[position.tile_m * num_tiles_n + position.tile_n];
  }
}

}  // extern "C"
