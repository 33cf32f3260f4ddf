// Flat functions around the launchers for ctypes, and the parts of the CUDA runtime that the launchers call.
#include <cuda.h>

#include <cstdlib>
#include <vector>

#include "dy_pass.h"
#include "hopper.cuh"
#include "lowrank_gemm.h"
#include "philox.h"
#include "prologue.h"

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

struct InputArrays {
  int kind;
  Array x, up, gain, in_scale, down;
  const int64_t* seed;
  int stream, threshold;
  float inverse_keep;
  int num_rows, width, rank, dtype;
};

static PrologueInput input_of(const InputArrays& arrays) {
  PrologueInput input = {};
  input.dtype = static_cast<DType>(arrays.dtype);
  input.kind = static_cast<PrologueKind>(arrays.kind);
  input.x = arrays.x.data;
  input.up = arrays.up.data;
  input.stride_x = arrays.x.stride;
  input.stride_up = arrays.up.stride;
  input.gain = floats(arrays.gain);
  input.in_scale = floats(arrays.in_scale);
  input.down = floats(arrays.down);
  input.dropout = {arrays.seed, arrays.stream, arrays.threshold, arrays.inverse_keep};
  input.num_rows = arrays.num_rows;
  input.width = arrays.width;
  input.rank = arrays.rank;
  return input;
}

int run_prologue(const InputArrays* arrays, float eps, const float* given_rstd, int activation, void* h, float* rstd,
                 void* a, void* z) {
  return launch_prologue({input_of(*arrays), eps, given_rstd, static_cast<Activation>(activation), h, rstd, a, z},
                         nullptr);
}

int run_prologue_backward(const InputArrays* arrays, const float* rstd, const Array* dh, const Array* da,
                          const Array* dresidual, const Array* dx, const Array* dup, void* dgain, void* din_scale) {
  PrologueBackward backward = {};
  backward.input = input_of(*arrays);
  backward.rstd = rstd;
  backward.dh = dh->data;
  backward.da = da->data;
  backward.dresidual = dresidual->data;
  backward.stride_dh = dh->stride;
  backward.stride_da = da->stride;
  backward.stride_dresidual = dresidual->stride;
  backward.stride_dx = dx->stride;
  backward.stride_dup = dup->stride;
  backward.dx = dx->data;
  backward.dup = dup->data;
  const size_t size = size_t(ceil_div(arrays->num_rows, kPrologueRows)) * arrays->width;
  std::vector<float> dgain_partials(size, NAN), din_scale_partials(size, NAN);
  backward.dgain_partials = dgain ? dgain_partials.data() : nullptr;
  backward.din_scale_partials = din_scale ? din_scale_partials.data() : nullptr;
  backward.dgain = dgain;
  backward.din_scale = din_scale;
  return launch_prologue_backward(backward, nullptr);
}

void run_dropped(uint64_t seed, int stream, int threshold, int num_rows, int num_cols, bool* mask) {
  for (int row = 0; row < num_rows; ++row) {
    for (int col = 0; col < num_cols; ++col) {
      mask[int64_t(row) * num_cols + col] = is_dropped(dropout_lanes(seed, stream, row, col / 8), col % 8, threshold);
    }
  }
}

// How often each tile of a grid is visited when `num_programs` programs share it.
void count_grouped_tiles(int num_tiles_m, int num_tiles_n, int* visits) {
  for (int tile = 0; tile < num_tiles_m * num_tiles_n; ++tile) {
    const TilePosition position = grouped_tile(tile, num_tiles_m, num_tiles_n);
    ++visits[position.tile_m * num_tiles_n + position.tile_n];
  }
}

}  // extern "C"
