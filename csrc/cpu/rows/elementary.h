// Elementary functions of float vectors, within two units in the last place unless said otherwise.
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

// 2^n e^r with n ln 2 + r = x, |r| <= ln 2 / 2 and a polynomial fitted to (e^r - 1 - r) / r^2 (error 3e-9).
MMPEFT_INLINE F32 exp(F32 x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // Beyond these results are infinity and zero; a nan stays.
  x = clamped(x, -105.0f, 89.0f);
  F32 shifted = x * kLog2e + kToInteger;
  F32 n = shifted - kToInteger;
  F32 r = x - n * kLn2High - n * kLn2Low;
  F32 q = splat(0.0013814467f);
  q = q * r + 0.0083687808f;
  q = q * r + 0.041668392f;
  q = q * r + 0.1666652f;
  q = q * r + 0.49999994f;
  F32 e = q * (r * r) + r + 1.0f;
#if MMPEFT_LANES == 16
  return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)e, (__m512)n);
#else
  return times_power_of_two(e, (I32)shifted - 0x4b400000);
#endif
}

MMPEFT_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }
MMPEFT_INLINE F32 silu(F32 x) { return x / (1.0f + exp(-x)); }
// The derivative of silu at x, whose sigmoid is s.
MMPEFT_INLINE F32 silu_derivative(F32 x, F32 s) { return s * (1.0f + x * (1.0f - s)); }

MMPEFT_INLINE F32 absolute(F32 x) { return (F32)((U32)x & 0x7fffffffu); }
MMPEFT_INLINE F32 with_sign_of(F32 magnitude, F32 x) { return (F32)((U32)magnitude | ((U32)x & 0x80000000u)); }

// The exponential form loses every digit near 0; there the odd series up to x^9 has an error below 1e-8.
MMPEFT_INLINE F32 tanh(F32 x) {
  F32 square = x * x;
  F32 series = square * (62.0f / 2835) - 17.0f / 315;
  series = series * square + 2.0f / 15;
  series = series * square - 1.0f / 3;
  series = (series * square + 1.0f) * x;
  F32 form = with_sign_of(1.0f - 2.0f / (exp(2.0f * absolute(x)) + 1.0f), x);
  return select(square < 0.0625f, series, form);
}

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
MMPEFT_INLINE F32 erf(F32 x) {
  F32 t = 1.0f / (1.0f + 0.3275911f * absolute(x));
  F32 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return with_sign_of(1.0f - p * t * exp(-x * x), x);
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
