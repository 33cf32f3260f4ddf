// h = prologue(x) and drop(h), one pass over x (a second one from cache for rms_norm's statistic).
//
//   none: h = x l      rms_norm: h = gain x rstd l, rstd = (mean(x^2) + eps)^-1/2      swiglu: h = silu(gate) up l
#pragma once

#include "csrc/cpu/rows/elementary.h"
#include "csrc/cpu/rows/philox.h"

namespace mmpeft {
namespace MMPEFT_ISA {

MMPEFT_INLINE float inverse_rms(F32 squares, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
}

template <typename T>
MMPEFT_INLINE float inverse_rms_of_row(const T* x, int64_t width, float eps) {
  F32 sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= width; k += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      F32 v = load(x + k + i * kLanes, Whole{});
      sums[i] += v * v;
    }
  for_columns(k, width, [&](int64_t col, auto part) {
    F32 v = load(x + col, part);
    sums[0] += v * v;
  });
  return inverse_rms((sums[0] + sums[1]) + (sums[2] + sums[3]), width, eps);
}

// What a prologue makes of a few columns of its input, rounded like eager torch's but for the last step, which the
// store rounds: h before its input scale and, for swiglu, what its gradient needs too.
struct Columns {
  F32 x, up, sigmoid_x, activated, h;
};

template <Prologue kName, typename T, typename Part>
MMPEFT_INLINE Columns columns_of(const T* x, const T* up, const float* gain, float rstd, int64_t k, Part part) {
  Columns at{};
  at.x = load(x + k, part);
  at.h = at.x;
  if constexpr (kName == Prologue::kRmsNorm) at.h = rounded<T>(at.x * rstd) * load(gain + k, part);
  if constexpr (kName == Prologue::kSwiglu) {
    at.up = load(up + k, part);
    at.sigmoid_x = sigmoid<T>(at.x);
    at.activated = rounded<T>(at.x * at.sigmoid_x);
    at.h = at.activated * at.up;
  }
  return at;
}

// Arguments are taken by value: a store could not change them, so they stay in registers.
template <Prologue kName, typename T>
void prologue_rows(const PrologueArgs args, int64_t begin, int64_t end) {
  using Bits = typename Format<T>::Bits;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(args.x, row);
    const T* up = kName == Prologue::kSwiglu ? row_of<T>(args.up, row) : nullptr;
    const int64_t next_row = row + 1 < end ? args.x.stride : 0;
    T* h_row = row_to_write<T>(args.h, row);
    T* dropped_row = row_to_write<T>(args.dropped, row);
    float rstd = 0.0f;
    if constexpr (kName == Prologue::kRmsNorm) {
      rstd = args.rstd ? args.rstd[row] : inverse_rms_of_row(x, args.width, args.eps);
      if (args.rstd_out) args.rstd_out[row] = rstd;
    }
    if (!h_row && !dropped_row) continue;
    for_dropout_blocks(args.dropout, row, args.width, [&](int64_t first, int64_t last, const int16_t* keep) {
      for_columns(first, last, [&](int64_t k, auto part) {
        // The next row's statistic would wait for memory, which is idle now.
        if constexpr (kName == Prologue::kRmsNorm) prefetch(x + next_row + k);
        F32 h = columns_of<kName>(x, up, args.gain, rstd, k, part).h;
        if (args.in_scale) h = rounded<T>(h) * load(args.in_scale + k, part);
        Bits bits = Format<T>::narrow(h);
        if (h_row) store_raw(h_row + k, bits, part);
        if (dropped_row) {
          if (keep) bits &= Format<T>::mask(load_raw<I16>(keep + (k - first), Whole{}));
          store_raw(dropped_row + k, bits, part);
        }
      });
    });
  }
}

template <typename T>
void prologue(const PrologueArgs& args, int64_t begin, int64_t end) {
  switch (args.name) {
    case Prologue::kNone: return prologue_rows<Prologue::kNone, T>(args, begin, end);
    case Prologue::kRmsNorm: return prologue_rows<Prologue::kRmsNorm, T>(args, begin, end);
    case Prologue::kSwiglu: return prologue_rows<Prologue::kSwiglu, T>(args, begin, end);
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
