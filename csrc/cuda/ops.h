// Torch entries of the CUDA kernels. All tensors are on one GPU; matrices have unit column stride and any row stride.
// What is wrong is noted in the status (check_cuda.h); the results count where it is ok.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace mmpeft::cuda {

using OptionalTensor = std::optional<at::Tensor>;
struct Status;

// out [M, N] = (s z U + x W (+ bias)) (* scale) (+ residual) in x's dtype, float16 or bfloat16; compute capability 9.0.
// transposed: weight [N, K], z [M, sum of ranks], u [N, R] with the ranks' columns used; else weight [K, N], u [R, N]
// and one segment. x, weight, z, u, residual and out are 16-byte aligned with rows of whole 16 bytes, segments but the
// last have a multiple of 64 columns, and ranks before the last are multiples of 8. residual may be out.
std::tuple<> lowrank_gemm_out(Status& status, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& z,
                              const OptionalTensor& u, double scaling, at::IntArrayRef num_outs, at::IntArrayRef ranks,
                              bool transposed, const OptionalTensor& bias, const OptionalTensor& scale,
                              const OptionalTensor& residual, at::Tensor& out);

// (da [M, sum of ranks] in dy's dtype, du [N, R] in u's dtype), undefined where not asked for. dy [M, N], a [M, sum of
// ranks] in float16 or bfloat16, u [N, R] in any float dtype; compute capability 8.0 and newer.
std::tuple<at::Tensor, at::Tensor> dy_pass(Status& status, const at::Tensor& dy, const at::Tensor& a,
                                           const at::Tensor& u, at::IntArrayRef num_outs, at::IntArrayRef ranks,
                                           double scaling,
                                           std::string_view activation, bool need_da, bool need_du);

}  // namespace mmpeft::cuda
