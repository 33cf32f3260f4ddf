// Elementary functions of float vectors. T is the format that the result is rounded to: 16-bit ones take less.
#pragma once

#include <cmath>

#include "csrc/cpu/rows/vec.h"

namespace mmpeft {
namespace MMPEFT_ISA {

// v * 2^n for n in [-152, 129], in two factors so that neither overflows and subnormal results are right.
MMPEFT_INLINE F32 times_power_of_two(F32 v, I32 n) {
  I32 half = n >> 1;
  return v * (F32)((U32)(half + 127) << 23) * (F32)((U32)(n - half + 127) << 23);
}

// e^x to the accuracy that a result in T needs: its relative error is 2e-7 for float, 4e-6 for 16-bit formats.
template <typename T>
MMPEFT_INLINE F32 exp(F32 x) {
  constexpr float kLog2e = 1.44269504f;
#if MMPEFT_LANES == 16
  if constexpr (sizeof(T) == 2) {
    // 2^floor(y) 2^r with y = x log2(e), 0 <= r < 1. The instructions take infinities: their r is 0.
    const F32 y = x * kLog2e;
    const F32 r = (F32)_mm512_maskz_reduce_ps(0xffff, (__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F32 e = splat(0.0134266855f);
    e = e * r + 0.0522424722f;
    e = e * r + 0.241280206f;
    e = e * r + 0.693044845f;
    e = e * r + 1.0f;
    return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)e, (__m512)y);
  }
#endif
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // Beyond these results are infinity and zero; a nan stays.
  x = clamped(x, -105.0f, 89.0f);
  // 2^n e^r with n ln 2 + r = x, |r| <= ln 2 / 2.
  const F32 shifted = x * kLog2e + kToInteger;
  const F32 n = shifted - kToInteger;
  F32 e;
  if constexpr (sizeof(T) == 2) {
    const F32 r = x * kLog2e - n;  // of 2^r
    e = splat(0.00958285317f);
    e = e * r + 0.055906425f;
    e = e * r + 0.240240986f;
    e = e * r + 0.693124193f;
    e = e * r + 1.0f;
  } else {
    const F32 r = x - n * kLn2High - n * kLn2Low;
    e = splat(0.00829031472f);
    e = e * r + 0.0418979295f;
    e = e * r + 0.166676362f;
    e = e * r + 0.499991496f;
    e = e * r + 0.999999708f;
    e = e * r + 1.0f;
  }
#if MMPEFT_LANES == 16
  return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)e, (__m512)n);
#else
  return times_power_of_two(e, (I32)shifted - 0x4b400000);
#endif
}

// 1 / v of v >= 1; 16-bit formats take the processor's estimate (2^-14) and one step of Newton's.
template <typename T>
MMPEFT_INLINE F32 reciprocal(F32 v) {
#if MMPEFT_LANES == 16
  if constexpr (sizeof(T) == 2) {
    const F32 estimate = (F32)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
    // Of infinity it is 0 and stays: no product of the two.
    const F32 finite = (F32)_mm512_maskz_min_ps(0xffff, (__m512)splat(0x1p126f), (__m512)v);
    return estimate + estimate * (1.0f - finite * estimate);
  }
#endif
  return 1.0f / v;
}

template <typename T>
MMPEFT_INLINE F32 sigmoid(F32 x) {
  return reciprocal<T>(1.0f + exp<T>(-x));
}
// The derivative of silu at x, whose sigmoid is s.
MMPEFT_INLINE F32 silu_derivative(F32 x, F32 s) { return s * (1.0f + x * (1.0f - s)); }

MMPEFT_INLINE F32 absolute(F32 x) { return (F32)((U32)x & 0x7fffffffu); }
MMPEFT_INLINE F32 with_sign_of(F32 magnitude, F32 x) { return (F32)((U32)magnitude | ((U32)x & 0x80000000u)); }

// The exponential form loses every digit near 0; there the odd series up to x^9 has an error below 1e-8.
template <typename T>
MMPEFT_INLINE F32 tanh(F32 x) {
  F32 square = x * x;
  F32 series = square * (62.0f / 2835) - 17.0f / 315;
  series = series * square + 2.0f / 15;
  series = series * square - 1.0f / 3;
  series = (series * square + 1.0f) * x;
  F32 form = with_sign_of(1.0f - 2.0f * reciprocal<T>(exp<T>(2.0f * absolute(x)) + 1.0f), x);
  return select(square < 0.0625f, series, form);
}

// The normal distribution's cumulative function, and e^(-x^2 / 2) on the way to it. Abramowitz and Stegun 7.1.26 of
// x / sqrt(2), halved: absolute error 8e-8.
struct Normal {
  F32 cumulative, exponential;
};
template <typename T>
MMPEFT_INLINE Normal normal(F32 x) {
  const F32 e = exp<T>(x * x * -0.5f);
  const F32 t = reciprocal<T>(1.0f + 0.23164189f * absolute(x));
  F32 p = splat(0.5307027145f);
  p = p * t - 0.726576014f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const F32 tail = p * t * e;
  return {select(x < 0.0f, tail, 1.0f - tail), e};
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
