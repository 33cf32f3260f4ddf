// The row kernels of the CPU provider: what they are given, and the table of one build of them.
//
// Each kernel works on a range of rows of plain arrays and knows no torch, no threads and no allocation; the torch
// entries beside this file check, allocate and run ranges in parallel. The same sources are built once for each
// instruction set (isa/); `kernels()` is the table in use. Strides count elements; columns are contiguous.
#pragma once

#include <cstdint>

namespace mmpeft {

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kNumDtypes };
enum class Prologue : int { kNone, kRmsNorm, kSwiglu };
enum class Activation : int { kIdentity, kTanh, kRelu, kGelu, kSilu };

// Floats in a vector of any instruction set.
constexpr int64_t kMostLanes = 16;

// Dropout of rows and columns: Philox4x32-7 under key `seed`; an element is kept where its signed 16-bit lane is at
// least `threshold`. No dropout while `active` is false.
struct Dropout {
  bool active = false;
  uint64_t seed = 0;
  uint32_t stream = 0;
  int32_t threshold = 0;
};

struct ConstRows {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// An array [B, heads, T, DH] in any layout whose last stride is one.
struct ConstHeads {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct KeepBitsArgs {
  Rows keep;  // int16, int32 or int64
  int itemsize;
  int64_t width;
  Dropout dropout;
};

struct PrologueArgs {
  Prologue name;
  int64_t width;
  float eps;
  ConstRows x, up;        // up: of swiglu
  const float* gain;      // [width], of rms_norm
  const float* in_scale;  // [width] or null
  const float* rstd;      // [rows], used instead of computed, or null
  float* rstd_out;        // [rows] or null
  Rows h, dropped;        // either may be null
  Dropout dropout;
};

struct PrologueBackwardArgs {
  Prologue name;
  int64_t width;
  ConstRows dh, low;  // low: da D, or null
  float low_factor;   // 1 / keep, applied to low
  Dropout dropout;    // of low and of `dropped`
  ConstRows x, up;
  const float* gain;
  const float* in_scale;
  const float* rstd;
  ConstRows dresidual;    // added to dx, or null
  Rows dx, dup, dropped;  // each may be null
};

struct HeadsArgs {
  int64_t heads, head_dim, length;  // rows are b * length + t
  float eps;
  ConstHeads x;
  const float* scale;  // [heads * head_dim] or null
  const float* gain;   // [head_dim] or null
  Dtype angle_dtype;
  ConstHeads cos, sin;  // `head` unused; null data: no rotation
  Heads out;
};

struct HeadsBackwardArgs {
  int64_t heads, head_dim, length;
  float eps;
  ConstHeads dy;
  ConstHeads x;  // null where neither dscale nor the gain needs it
  const float* scale;
  const float* gain;
  Dtype angle_dtype;
  ConstHeads cos, sin;
  Heads dx;  // may be null
};

// Floats of scratch that both take: cosines, sines, and for the backward as many heads as a vector has lanes.
constexpr int64_t heads_scratch_size(int64_t head_dim) { return (2 + kMostLanes) * head_dim; }

// Prefix keys and values: float32 [HK, P, DH], and words [HK, words of P, DH] of `Kernels::tokens_in_a_word` tokens:
// one float, or two bfloat16 (the first in the lower half, zeros after the last) where a kernel multiplies in pairs.
struct PrefixTables {
  int64_t num_prefix;
  const float *k, *v;
  const uint32_t *k_words, *v_words;
};

// Arrays [B, H, T] in any layout.
template <typename Value>
struct PerQuery {
  Value* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

// Rows of one key/value head are (b * group_size + g) * length + t.
struct MergePrefixArgs {
  int64_t length, head_dim, group_size;
  float scale;
  ConstHeads q;
  PrefixTables prefix;
  Heads out;                   // read and written
  PerQuery<float> lse;         // read and written
  PerQuery<const bool> alive;  // or null
};

struct PrefixBackwardArgs {
  int64_t length, head_dim, group_size;
  float scale;
  ConstHeads dout, q, out;
  PrefixTables prefix;
  PerQuery<const float> lse;
  Heads dq;  // read and written
};

// Floats of scratch that both take; zeros at first.
constexpr int64_t prefix_scratch_size(int64_t num_prefix, int64_t head_dim) {
  return kMostLanes * (2 * (head_dim + kMostLanes) + 3 * (num_prefix + 1)) + 2 * (head_dim + kMostLanes);
}

struct CrossEntropyArgs {
  int64_t num_words;
  Rows logits;
  const int64_t* labels;
  float count;
  bool need_grad;
  float* losses;  // [rows]
};

struct ActivationArgs {
  Activation activation;
  int64_t width;
  ConstRows dz;  // null: out = f(a); else out = dz f'(a)
  ConstRows a;
  Rows out;
};

struct Unpack4BitArgs {
  int64_t width;
  const uint8_t* packed;  // two elements a byte, over all rows
  const float* scales;    // one for 2^log2_blocksize elements, over all rows
  const float* code;      // [16]
  int log2_blocksize;
  Rows out;
};

struct Unpack8BitArgs {
  int64_t width;
  ConstRows values;     // int8
  const float* scales;  // [rows]
  Rows out;
};

template <typename Args>
using RowKernel = void (*)(const Args&, int64_t begin, int64_t end);

// Tables are indexed by Dtype.
struct Kernels {
  const char* name;
  int lanes;  // floats in a vector
  RowKernel<KeepBitsArgs> keep_bits;
  RowKernel<PrologueArgs> prologue[kNumDtypes];
  // scratch: [width] of rms_norm with low or in_scale. dgain, din_scale: [width] sums that the range is added to, or
  // null.
  void (*prologue_backward[kNumDtypes])(const PrologueBackwardArgs&, int64_t begin, int64_t end, float* scratch,
                                        float* dgain, float* din_scale);
  // scratch: [heads_scratch_size].
  void (*heads[kNumDtypes])(const HeadsArgs&, int64_t begin, int64_t end, float* scratch);
  // The same scratch. dscale [heads * head_dim], dgain [head_dim]: sums that the range is added to, or null.
  void (*heads_backward[kNumDtypes])(const HeadsBackwardArgs&, int64_t begin, int64_t end, float* scratch,
                                     float* dscale, float* dgain);
  int tokens_in_a_word[kNumDtypes];
  // Rows of key/value head `kv_head`; scratch: [prefix_scratch_size].
  void (*merge_prefix[kNumDtypes])(const MergePrefixArgs&, int64_t kv_head, int64_t begin, int64_t end,
                                   float* scratch);
  // The same. dk, dv [P, DH]: sums that the range is added to.
  void (*prefix_backward[kNumDtypes])(const PrefixBackwardArgs&, int64_t kv_head, int64_t begin, int64_t end,
                                      float* scratch, float* dk, float* dv);
  RowKernel<CrossEntropyArgs> cross_entropy[kNumDtypes];
  RowKernel<ActivationArgs> activation[kNumDtypes];
  RowKernel<Unpack4BitArgs> unpack_4bit[kNumDtypes];
  RowKernel<Unpack8BitArgs> unpack_8bit[kNumDtypes];
};

// The table in use: the best that the processor runs, or what `use_instruction_set` asked for.
const Kernels& kernels();

// Names of the instruction sets that this processor runs, worst first; null-terminated.
const char* const* instruction_sets();

// Whether the name is one of them; then `kernels()` is its table from now on.
bool use_instruction_set(const char* name);

}  // namespace mmpeft
