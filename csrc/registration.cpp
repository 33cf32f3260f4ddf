// The ops of this extension: their schemas and, by device, what runs them.
#include <torch/library.h>

#include "csrc/cpu/ops.h"

TORCH_LIBRARY(mmpeft_fast_c, m) {
  m.def("keep_bits(Tensor seed, float p, int stream, Tensor(a!) keep) -> ()");
  m.def("prologue(str name, Tensor x, Tensor? up, Tensor? gain, float eps, Tensor? in_scale, Tensor? rstd, Tensor? seed, float p, int stream, Tensor(a!)? h, Tensor(b!)? dropped, Tensor(c!)? rstd_out) -> ()");
  m.def("prologue_backward(str name, Tensor dh, Tensor? low, float low_factor, Tensor? seed, float p, int stream, Tensor? x, Tensor? up, Tensor? gain, Tensor? in_scale, Tensor? rstd, Tensor? dresidual, Tensor(a!)? dx, Tensor(b!)? dup, Tensor(c!)? dropped, Tensor(d!)? dgain, Tensor(e!)? din_scale) -> ()");
  m.def("heads(Tensor x, Tensor? scale, Tensor? gain, float eps, Tensor? cos, Tensor? sin, Tensor(a!) out) -> ()");
  m.def("heads_backward(Tensor dy, Tensor? x, Tensor? scale, Tensor? gain, float eps, Tensor? cos, Tensor? sin, Tensor(a!)? dx, Tensor(b!)? dscale, Tensor(c!)? dgain) -> ()");
  m.def("merge_prefix(Tensor q, Tensor prefix_k, Tensor prefix_v, float scale, Tensor? alive, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("prefix_backward(Tensor dout, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor out, Tensor lse, float scale, Tensor(a!) dq, Tensor(b!) dprefix_k, Tensor(c!) dprefix_v) -> ()");
  m.def("cross_entropy(Tensor(a!) logits, Tensor labels, Tensor count, bool need_grad, Tensor(b!) loss) -> ()");
  m.def("activation(str name, Tensor a, Tensor? dz, Tensor(a!) out) -> ()");
  m.def("unpack_4bit(Tensor packed, Tensor scales, Tensor code, int blocksize, Tensor(a!) out) -> ()");
  m.def("unpack_8bit(Tensor values, Tensor scales, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(mmpeft_fast_c, CPU, m) {
  m.impl("keep_bits", &mmpeft::keep_bits);
  m.impl("prologue", &mmpeft::prologue);
  m.impl("prologue_backward", &mmpeft::prologue_backward);
  m.impl("heads", &mmpeft::heads);
  m.impl("heads_backward", &mmpeft::heads_backward);
  m.impl("merge_prefix", &mmpeft::merge_prefix);
  m.impl("prefix_backward", &mmpeft::prefix_backward);
  m.impl("cross_entropy", &mmpeft::cross_entropy);
  m.impl("activation", &mmpeft::activation);
  m.impl("unpack_4bit", &mmpeft::unpack_4bit);
  m.impl("unpack_8bit", &mmpeft::unpack_8bit);
}
