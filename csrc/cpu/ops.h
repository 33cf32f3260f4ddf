// The ops of the CPU provider. Every result is written to a tensor that the caller gives; registration.cpp has their
// schemas, mmpeft_fast/ops/kernels_cpu.py allocates. Matrices have unit column stride and any row stride.
#pragma once

#include <string_view>

#include "csrc/cpu/entry.h"

namespace mmpeft {

// keep [M, K] int16, int32 or int64: all bits set where an element is kept, none where it is dropped.
void keep_bits(const at::Tensor& seed, double p, int64_t stream, const at::Tensor& keep);

// h and drop(h) [M, K] of the prologue `name` (none, rms_norm, swiglu); each is written where given. rstd [M] float32
// is read where given, rstd_out written.
void prologue(std::string_view name, const at::Tensor& x, const OptionalTensor& up, const OptionalTensor& gain,
              double eps, const OptionalTensor& in_scale, const OptionalTensor& rstd, const OptionalTensor& seed,
              double p, int64_t stream, const OptionalTensor& h, const OptionalTensor& dropped,
              const OptionalTensor& rstd_out);

// Gradients of the prologue from dh + mask low low_factor [M, K], with dresidual added to dx; each of dx, dup, dropped
// [M, K] and dgain, din_scale [K] float32 is written where given. dx may be dh.
void prologue_backward(std::string_view name, const at::Tensor& dh, const OptionalTensor& low, double low_factor,
                       const OptionalTensor& seed, double p, int64_t stream, const OptionalTensor& x,
                       const OptionalTensor& up, const OptionalTensor& gain, const OptionalTensor& in_scale,
                       const OptionalTensor& rstd, const OptionalTensor& dresidual, const OptionalTensor& dx,
                       const OptionalTensor& dup, const OptionalTensor& dropped, const OptionalTensor& dgain,
                       const OptionalTensor& din_scale);

// out [B, heads, T, DH] = rotate(norm(x scale)) of x [B, heads, T, DH]; cos, sin [B or 1, T, DH].
void heads(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& gain, double eps,
           const OptionalTensor& cos, const OptionalTensor& sin, const at::Tensor& out);

// dx [B, heads, T, DH], dscale [heads * DH] and dgain [DH] float32, each where given.
void heads_backward(const at::Tensor& dy, const OptionalTensor& x, const OptionalTensor& scale,
                    const OptionalTensor& gain, double eps, const OptionalTensor& cos, const OptionalTensor& sin,
                    const OptionalTensor& dx, const OptionalTensor& dscale, const OptionalTensor& dgain);

// Turns out [B, H, T, DH] and lse [B, H, T] float32 of the main part into those of the whole softmax; alive [B, H, T].
void merge_prefix(const at::Tensor& q, const at::Tensor& prefix_k, const at::Tensor& prefix_v, double scale,
                  const OptionalTensor& alive, const at::Tensor& out, const at::Tensor& lse);

// Adds the prefix's part to dq; dprefix_k, dprefix_v [HK, P, DH] float32.
void prefix_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& prefix_k,
                     const at::Tensor& prefix_v, const at::Tensor& out, const at::Tensor& lse, double scale,
                     const at::Tensor& dq, const at::Tensor& dprefix_k, const at::Tensor& dprefix_v);

// loss (0-dim float32) of logits [S, V], which are replaced by its gradient where need_grad; count: 0-dim.
void cross_entropy(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& count, bool need_grad,
                   const at::Tensor& loss);

// out = f(a), or dz f'(a) where dz is given; all [M, R].
void activation(std::string_view name, const at::Tensor& a, const OptionalTensor& dz, const at::Tensor& out);

// out [N, K] = code[index] scale of packed [NK / 2] bytes, scales [NK / blocksize] float32 and code [16] float32: element
// i of the matrix, row after row, has the upper half of byte i / 2 where i is even, and scale i / blocksize.
void unpack_4bit(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& code, int64_t blocksize,
                 const at::Tensor& out);

// out [N, K] = values scales of values [N, K] int8 and scales [N] float32.
void unpack_8bit(const at::Tensor& values, const at::Tensor& scales, const at::Tensor& out);

}  // namespace mmpeft
