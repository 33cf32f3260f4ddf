// Torch entry of lowrank_gemm_sm90.cu.
#include "lowrank_gemm.h"

#include "check_cuda.h"
#include "ops.h"

namespace mmpeft::cuda {
namespace {

// A matrix that TMA can take.
Matrix tma_matrix(Status& status, const char* name, const at::Tensor& tensor, int64_t rows, int64_t cols,
                  const at::Tensor& like) {
  if (!check_matrix(status, name, tensor, rows, cols, like)) return {};
  const bool has_rows = rows <= 1 || (tensor.stride(0) >= cols && tensor.stride(0) * tensor.element_size() % 16 == 0);
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  MMPEFT_EXPECT(status, has_rows && aligned, "expected ", name,
                " 16-byte aligned with a row stride of whole 16 bytes for TMA, got address ", tensor.const_data_ptr(),
                " and a row stride of ", tensor.stride(0), " ", tensor.element_size(), "-byte elements");
  // The launcher writes through out's matrix alone.
  return {const_cast<void*>(tensor.const_data_ptr()), static_cast<int>(rows), static_cast<int>(cols), tensor.stride(0)};
}

}  // namespace

std::tuple<> lowrank_gemm_out(Status& status, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& z,
                              const OptionalTensor& u, double scaling, at::IntArrayRef num_outs, at::IntArrayRef ranks,
                              bool transposed, const OptionalTensor& bias, const OptionalTensor& scale,
                              const OptionalTensor& residual, at::Tensor& out) {
  status.op = "lowrank_gemm";
  MMPEFT_EXPECT(status, x.is_cuda() && x.dim() == 2 && weight.dim() == 2, "expected matrices x and weight on a GPU, ",
                "got x ", x.sizes(), " on ", x.device(), " and weight ", weight.sizes());
  MMPEFT_EXPECT(status, z.has_value() == u.has_value(), "expected z and u together, got only ", z ? "z" : "u");
  const int64_t num_rows = x.size(0), depth = x.size(1), num_out = weight.size(transposed ? 0 : 1);
  MMPEFT_EXPECT(status, depth >= 1, "expected x with columns, got ", x.sizes());
  MMPEFT_EXPECT(status, transposed || num_outs.size() == 1, "expected one segment with transposed=False, got ",
                num_outs);
  LowRankGemm gemm = {};
  gemm.dtype = half_dtype_of(status, "x", x);
  gemm.transposed = transposed;
  gemm.scaling = static_cast<float>(scaling);
  check_matrix(status, "out", out, num_rows, num_out, x, /*is_written=*/true);
  check_matrix(status, "weight", weight, transposed ? num_out : depth, transposed ? depth : num_out, x);
  if (!status.ok()) return {};
  const int device = x.get_device();
  const int arch = architecture(status, device);
  MMPEFT_EXPECT(status, arch == 90, "expected a GPU of compute capability 9.0, got ", arch / 10, ".", arch % 10);
  const int num_multiprocessors = device_attribute(status, cudaDevAttrMultiProcessorCount, device);
  gemm.num_programs = num_multiprocessors;
  gemm.block_n = lowrank_gemm_block_n(static_cast<int>(num_rows), static_cast<int>(num_out), num_multiprocessors);
  int64_t sum_of_ranks = 0;
  if (z.has_value()) {
    MMPEFT_EXPECT(status, z->dim() == 2 && u->dim() == 2, "expected matrices z and u, got ", z->sizes(), " and ",
                  u->sizes());
    sum_of_ranks = z->size(1);
  }
  gemm.segments = segment_table(status, num_outs, ranks, num_out, sum_of_ranks, gemm.block_n);
  for (int i = 0; i < gemm.segments.num_segments; ++i) {
    const Segment& segment = gemm.segments.segments[i];
    MMPEFT_EXPECT(status, segment.first_column % kStoreColumns == 0, "expected segments of whole ", kStoreColumns,
                  " columns but for the last, got ", num_outs);
    MMPEFT_EXPECT(status, segment.num_ranks == 0 || segment.first_rank % 8 == 0,
                  "expected ranks that are multiples of 8 but for the last, got ", ranks);
  }
  if (num_rows == 0 || num_out == 0 || !status.ok()) return {};
  gemm.x = tma_matrix(status, "x", x, num_rows, depth, x);
  gemm.weight = tma_matrix(status, "weight", weight, weight.size(0), weight.size(1), x);
  gemm.out = tma_matrix(status, "out", out, num_rows, num_out, x);
  if (sum_of_ranks > 0) {
    int64_t largest = 0;
    for (const int64_t rank : ranks) largest = std::max(largest, rank);
    const int64_t width = u->size(transposed ? 1 : 0);
    MMPEFT_EXPECT(status, transposed ? width >= largest : width == largest, "expected u with ", largest, " ranks, got ",
                  u->sizes(), transposed ? " [N, R]" : " [R, N]");
    gemm.z = tma_matrix(status, "z", *z, num_rows, sum_of_ranks, x);
    gemm.u = tma_matrix(status, "u", *u, transposed ? num_out : width, transposed ? width : num_out, x);
  }
  gemm.bias = float_array(status, "bias", bias, {num_out}, x);
  gemm.scale = float_array(status, "scale", scale, {num_out}, x);
  if (residual.has_value()) gemm.residual = tma_matrix(status, "residual", *residual, num_rows, num_out, x);
  if (!status.ok()) return {};
  const c10::cuda::CUDAGuard guard(x.device());
  status.launched(launch_lowrank_gemm_sm90(gemm, c10::cuda::getCurrentCUDAStream(device)));
  return {};
}

}  // namespace mmpeft::cuda
