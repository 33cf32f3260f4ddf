// Gradients of a prologue's inputs from dh, the low-rank part of dh added and drop(h) recomputed on the way.
//
//   dh += mask low / keep, then dh l       none: dx = dh      swiglu: dgate = dh up silu'(gate), dup = dh silu(gate)
//   rms_norm: n = x rstd, dn = dh gain, dx = (dn - n mean(dn n)) rstd, dgain = sum_m dh n
//   dl = sum_m dh h0, h0 the prologue's result before its input scale l
#pragma once

#include "csrc/cpu/rows/prologue.h"

namespace mmpeft {
namespace MMPEFT_ISA {

template <typename Part>
MMPEFT_INLINE void add_to(float* sums, F32 v, Part part) {
  store(sums, load(sums, part) + v, part);
}

template <Prologue kName, typename T>
void prologue_backward_rows(const PrologueBackwardArgs args, int64_t begin, int64_t end, float* scratch, float* dgain,
                            float* din_scale) {
  using Bits = typename Format<T>::Bits;
  const int64_t width = args.width;
  const bool wants_h = args.dropped.data || din_scale;
  for (int64_t row = begin; row < end; ++row) {
    const T* dh_row = row_of<T>(args.dh, row);
    const T* low_row = args.low.data ? row_of<T>(args.low, row) : nullptr;
    const T* x = args.x.data ? row_of<T>(args.x, row) : nullptr;
    const T* up = args.up.data ? row_of<T>(args.up, row) : nullptr;
    const T* dresidual = args.dresidual.data ? row_of<T>(args.dresidual, row) : nullptr;
    const int64_t next_x = row + 1 < end ? args.x.stride : 0, next_dh = row + 1 < end ? args.dh.stride : 0;
    T* dx_row = row_to_write<T>(args.dx, row);
    T* dup_row = row_to_write<T>(args.dup, row);
    T* dropped_row = row_to_write<T>(args.dropped, row);
    const float rstd = kName == Prologue::kRmsNorm ? args.rstd[row] : 0.0f;
    // rms_norm's second sweep takes dh from here where the first one changed it.
    T* kept = kName == Prologue::kRmsNorm && (low_row || args.in_scale) ? reinterpret_cast<T*>(scratch) : nullptr;
    F32 projection{};

    for_dropout_blocks(args.dropout, row, width, [&](int64_t first, int64_t last, const int16_t* keep) {
      for_columns(first, last, [&](int64_t k, auto part) {
        F32 dh = load(dh_row + k, part);
        Bits keep_bits = ~Bits{};
        if (keep) keep_bits = Format<T>::mask(load_raw<I16>(keep + (k - first), Whole{}));
        if (low_row) {
          const Bits low = load_raw<Bits>(low_row + k, part) & keep_bits;
          dh = rounded<T>(dh + Format<T>::widen(low) * args.low_factor);
        }
        Columns at{};
        if (kName != Prologue::kNone || wants_h) at = columns_of<kName>(x, up, args.gain, rstd, k, part);
        if (wants_h) {
          F32 h = at.h;
          if (din_scale) add_to(din_scale + k, dh * h, part);
          if (args.in_scale) h = rounded<T>(h) * load(args.in_scale + k, part);
          if (dropped_row) store_raw(dropped_row + k, Format<T>::narrow(h) & keep_bits, part);
        }
        if (args.in_scale) dh = rounded<T>(dh * load(args.in_scale + k, part));
        if constexpr (kName == Prologue::kNone) {
          if (dresidual) dh += load(dresidual + k, part);
          if (dx_row) store(dx_row + k, dh, part);
        } else if constexpr (kName == Prologue::kRmsNorm) {
          if (kept) store(kept + k, dh, part);
          projection += dh * load(args.gain + k, part) * (at.x * rstd);
        } else if (dx_row || dup_row) {
          if (dup_row) store(dup_row + k, dh * at.activated, part);
          if (dx_row) store(dx_row + k, rounded<T>(dh * at.up) * silu_derivative(at.x, at.sigmoid_x), part);
        }
      });
    });

    if constexpr (kName == Prologue::kRmsNorm) {
      const float mean = sum_of(projection) / static_cast<float>(width);
      const T* second = kept ? kept : dh_row;
      for_columns(0, width, [&](int64_t k, auto part) {
        // The next row's sums would wait for memory, which is idle now; but rows of floats, or more than these two,
        // push each other out of the first-level cache.
        if (sizeof(T) == 2 && !kept) {
          prefetch(x + next_x + k);
          prefetch(dh_row + next_dh + k);
        }
        const F32 dh = load(second + k, part), normalised = load(x + k, part) * rstd;
        if (dgain) add_to(dgain + k, dh * normalised, part);
        if (!dx_row) return;
        F32 dx = (dh * load(args.gain + k, part) - normalised * mean) * rstd;
        if (dresidual) dx += load(dresidual + k, part);
        store(dx_row + k, dx, part);
      });
    }
  }
}

template <typename T>
void prologue_backward(const PrologueBackwardArgs& args, int64_t begin, int64_t end, float* scratch, float* dgain,
                       float* din_scale) {
  switch (args.name) {
    case Prologue::kNone:
      return prologue_backward_rows<Prologue::kNone, T>(args, begin, end, scratch, dgain, din_scale);
    case Prologue::kRmsNorm:
      return prologue_backward_rows<Prologue::kRmsNorm, T>(args, begin, end, scratch, dgain, din_scale);
    case Prologue::kSwiglu:
      return prologue_backward_rows<Prologue::kSwiglu, T>(args, begin, end, scratch, dgain, din_scale);
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
