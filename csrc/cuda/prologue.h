// h = prologue(x) with a = drop(h) D^T of the branches that share h, and the gradients of its inputs.
//   none: h = x l    rms_norm: h = gain x rstd l, rstd = (mean(x^2) + eps)^-1/2    swiglu: h = silu(gate) up l
// Semantics of kernels/mmpeft_kernels/prologue.py and prologue_backward.py, roundings included.
#pragma once

#include <cuda_runtime_api.h>

#include "activations.h"
#include "dtype.h"

namespace mmpeft::cuda {

enum class PrologueKind : int { kNone, kRmsNorm, kSwiGlu };

// Dropout of an [M, K] operand; no seed: none. threshold = round(p 2^16) - 2^15, inverse_keep = 1 / (1 - p in 16 bits).
struct Dropout {
  const int64_t* seed = nullptr;  // on the device
  int stream = 0;
  int threshold = 0;
  float inverse_keep = 1.0f;
};

// Rows of a block where it multiplies or sums over rows; otherwise a block has one row.
constexpr int kPrologueRows = 16;

// What forward and backward have in common. All matrices have unit column stride.
struct PrologueInput {
  DType dtype;  // of x, up, h and a: kFloat16 or kBFloat16
  PrologueKind kind;
  const void* x;            // [M, K]; the gate of swiglu
  const void* up;           // [M, K], swiglu only
  int64_t stride_x, stride_up;
  FloatArray gain;          // [K], rms_norm only
  FloatArray in_scale;      // [K], or no data
  FloatArray down;          // [R, K], or no data
  Dropout dropout;
  int num_rows, width, rank;
};

struct Prologue {
  PrologueInput input;
  float eps;
  const float* given_rstd;  // [M], used instead of computed; or null
  Activation activation;
  void* h;      // [M, K], contiguous, or null
  float* rstd;  // [M], or null
  void* a;      // [M, R], contiguous
  void* z;      // [M, R], contiguous, f(a); or null
};

// M and K >= 1.
cudaError_t launch_prologue(const Prologue& prologue, cudaStream_t stream);

struct PrologueBackward {
  PrologueInput input;      // x and up may be null where nothing needs them
  const float* rstd;        // [M], rms_norm only
  void* dh;                 // [M, K]; rms_norm overwrites it
  const void* da;           // [M, R], or null: dh += mask (da D) inverse_keep
  const void* dresidual;    // [M, K] added to dx, or null
  int64_t stride_dh, stride_da, stride_dresidual, stride_dx, stride_dup;
  void* dx;                 // [M, K], or null; dgate of swiglu
  void* dup;                // [M, K], or null; swiglu only
  float* dgain_partials;    // [ceil(M / kPrologueRows), K], or null; rms_norm only
  float* din_scale_partials;
  void* dgain;              // [K] in gain's dtype
  void* din_scale;          // [K] in in_scale's dtype
};

// M and K >= 1.
cudaError_t launch_prologue_backward(const PrologueBackward& backward, cudaStream_t stream);

}  // namespace mmpeft::cuda
