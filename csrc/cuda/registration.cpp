// The CUDA ops: their schemas and what runs them.
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(mmpeft_fast_cuda, m) {
  m.def("lowrank_gemm_out(Tensor x, Tensor weight, Tensor? z, Tensor? u, float scaling, int[] num_outs, int[] ranks, bool transposed, Tensor? bias, Tensor? scale, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("dy_pass(Tensor dy, Tensor a, Tensor u, int[] num_outs, int[] ranks, float scaling, str activation, bool need_da, bool need_du) -> (Tensor, Tensor)");
  m.def("prologue(str name, Tensor x, Tensor? up, Tensor? gain, float eps, Tensor? in_scale, Tensor? rstd, Tensor? down, str activation, Tensor? seed, float p, int stream, bool write_h) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("prologue_backward(str name, Tensor(a!) dh, Tensor? x, Tensor? up, Tensor? gain, Tensor? in_scale, Tensor? rstd, Tensor? da, Tensor? down, Tensor? seed, float p, int stream, Tensor? dresidual, Tensor(b!)? dx, Tensor(c!)? dup, bool need_dgain, bool need_din_scale) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmpeft_fast_cuda, CUDA, m) {
  m.impl("lowrank_gemm_out", &mmpeft::cuda::lowrank_gemm_out);
  m.impl("dy_pass", &mmpeft::cuda::dy_pass);
  m.impl("prologue", &mmpeft::cuda::prologue);
  m.impl("prologue_backward", &mmpeft::cuda::prologue_backward);
}
