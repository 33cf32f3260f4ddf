// Vectors of kLanes floats on the compiler's vector extension, and how float, bfloat16 and float16 are loaded into
// them, rounded (to nearest even) and stored. Built once for each instruction set, in its own namespace MMPEFT_ISA;
// only headers without inline functions of note are included, so that no other object shares code with this one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MMPEFT_INLINE inline __attribute__((always_inline))
// The same for lambdas, which go between the parameters and the body.
#define MMPEFT_LAMBDA __attribute__((always_inline))

namespace mmpeft {
namespace MMPEFT_ISA {

constexpr int kLanes = MMPEFT_LANES;

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef int16_t I16 __attribute__((vector_size(2 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

// How many columns a step covers: a whole vector, or the first n lanes of one, the rest read as zero.
struct Whole {};
struct First {
  int n;
};

// Calls step(column, Whole) for whole vectors and step(column, First) for the rest of [begin, end).
template <typename Step>
MMPEFT_INLINE void for_columns(int64_t begin, int64_t end, Step step) {
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) step(k, Whole{});
  if (k < end) step(k, First{static_cast<int>(end - k)});
}

template <typename V>
MMPEFT_INLINE V load_raw(const void* p, Whole) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
MMPEFT_INLINE V load_raw(const void* p, First part) {
  V v{};
  memcpy(&v, p, sizeof(v[0]) * part.n);
  return v;
}
template <typename V>
MMPEFT_INLINE void store_raw(void* p, V v, Whole) {
  memcpy(p, &v, sizeof v);
}
template <typename V>
MMPEFT_INLINE void store_raw(void* p, V v, First part) {
  memcpy(p, &v, sizeof(v[0]) * part.n);
}

template <typename To, typename From>
MMPEFT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as: sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MMPEFT_INLINE F32 splat(float value) { return value - F32{}; }
MMPEFT_INLINE F32 select(I32 condition, F32 yes, F32 no) { return condition ? yes : no; }

// v where it is above `highest`; a nan is not.
#if MMPEFT_LANES == 16
MMPEFT_INLINE F32 highest_of(F32 v, F32 highest) {
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)v, (__m512)highest);
}
#elif MMPEFT_LANES == 8
MMPEFT_INLINE F32 highest_of(F32 v, F32 highest) { return (F32)_mm256_max_ps((__m256)v, (__m256)highest); }
#else
MMPEFT_INLINE F32 highest_of(F32 v, F32 highest) { return select(v > highest, v, highest); }
#endif

// low where v is below it, high where v is above it; a nan stays.
#if MMPEFT_LANES == 16
MMPEFT_INLINE F32 clamped(F32 v, float low, float high) {
  const __m512 below = _mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)v);
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), below);
}
#elif MMPEFT_LANES == 8
MMPEFT_INLINE F32 clamped(F32 v, float low, float high) {
  return (F32)_mm256_max_ps((__m256)splat(low), _mm256_min_ps((__m256)splat(high), (__m256)v));
}
#else
MMPEFT_INLINE F32 clamped(F32 v, float low, float high) {
  v = select(v > high, splat(high), v);
  return select(v < low, splat(low), v);
}
#endif

// Pairwise, from halves to lanes.
MMPEFT_INLINE float sum_of(F32 v) {
#if MMPEFT_LANES == 16
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif MMPEFT_LANES == 8
  const F32 eight = v;
#endif
#if MMPEFT_LANES >= 8
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const F32 four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// a with its lanes' blocks of kSize, every second one, replaced by those of b that precede them; and the other way
// round: one step of a transposition on a pair of its rows.
template <int kSize, int... kLane>
MMPEFT_INLINE U32 even_blocks(U32 a, U32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kSize ? kLane - kSize + kLanes : kLane)...);
}
template <int kSize, int... kLane>
MMPEFT_INLINE U32 odd_blocks(U32 a, U32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kSize ? kLane + kLanes : kLane + kSize)...);
}

// Transposes a square of words in place.
template <int kSize = kLanes / 2>
MMPEFT_INLINE void transpose(U32 (&rows)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSize) continue;
    const U32 a = rows[i], b = rows[i + kSize];
    rows[i] = even_blocks<kSize>(a, b, Lanes{});
    rows[i + kSize] = odd_blocks<kSize>(a, b, Lanes{});
  }
  if constexpr (kSize > 1) transpose<kSize / 2>(rows);
}

// sum_of each of kLanes vectors, in the lanes of one; the same sums, bit by bit.
MMPEFT_INLINE F32 sums_of(const F32 (&vectors)[kLanes]) {
  U32 rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = (U32)vectors[i];
  transpose(rows);
  F32 sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = (F32)rows[i];
#pragma GCC unroll 4
  for (int size = kLanes / 2; size > 0; size /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) sums[i] += sums[i + size];
  return sums[0];
}

MMPEFT_INLINE F32 square_root(F32 v) {
#if MMPEFT_LANES == 16
  return (F32)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif MMPEFT_LANES == 8
  return (F32)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Conversions between 16 and 32 bits: compilers split the generic ones into halves.
#if MMPEFT_LANES == 16
MMPEFT_INLINE U32 widen_bits(U16 v) { return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
MMPEFT_INLINE I32 widen_signed(I16 v) { return (I32)_mm512_maskz_cvtepi16_epi32(0xffff, (__m256i)v); }
MMPEFT_INLINE U16 narrow_bits(U32 v) { return (U16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif MMPEFT_LANES == 8
MMPEFT_INLINE U32 widen_bits(U16 v) { return (U32)_mm256_cvtepu16_epi32((__m128i)v); }
MMPEFT_INLINE I32 widen_signed(I16 v) { return (I32)_mm256_cvtepi16_epi32((__m128i)v); }
// Of values below 2^16: nothing saturates.
MMPEFT_INLINE U16 narrow_bits(U32 v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
MMPEFT_INLINE U32 widen_bits(U16 v) { return __builtin_convertvector(v, U32); }
MMPEFT_INLINE I32 widen_signed(I16 v) { return __builtin_convertvector(v, I32); }
MMPEFT_INLINE U16 narrow_bits(U32 v) { return __builtin_convertvector(v, U16); }
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if MMPEFT_LANES == 16
// The masked forms, because GCC 12 warns of an undefined operand within the plain ones.
MMPEFT_INLINE F32 widen_half(U16 bits) { return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
MMPEFT_INLINE U16 narrow_half(F32 v) {
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif MMPEFT_LANES == 8
MMPEFT_INLINE F32 widen_half(U16 bits) { return (F32)_mm256_cvtph_ps((__m128i)bits); }
MMPEFT_INLINE U16 narrow_half(F32 v) {
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// By exponent arithmetic: a half moved into a float's fields is 2^112 too small, subnormals included.
MMPEFT_INLINE F32 widen_half(U16 bits) {
  U32 wide = __builtin_convertvector(bits, U32);
  F32 magnitude = (F32)((wide & 0x7fffu) << 13) * 0x1p112f;
  U32 special = (U32)((wide & 0x7c00u) == 0x7c00u);
  U32 finite = (U32)magnitude & ~special;
  U32 infinite_or_nan = (((wide & 0x3ffu) << 13) | 0x7f800000u) & special;
  return (F32)(finite | infinite_or_nan | ((wide & 0x8000u) << 16));
}
MMPEFT_INLINE U16 narrow_half(F32 v) {
  U32 sign = ((U32)v >> 16) & 0x8000u;
  U32 magnitude = (U32)v & 0x7fffffffu;
  // Subnormal halves: adding 1/2 makes the float's own rounding drop the bits that a half does not have.
  U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? U32{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, U16);
}
#endif

// How a storage type's bits become floats and back. Bits: the vector of its bit patterns.
template <typename T>
struct Format;

template <>
struct Format<float> {
  using Bits = U32;
  static MMPEFT_INLINE F32 widen(Bits bits) { return (F32)bits; }
  static MMPEFT_INLINE Bits narrow(F32 v) { return (Bits)v; }
  static MMPEFT_INLINE F32 round(F32 v) { return v; }
  static MMPEFT_INLINE Bits mask(I16 keep) { return (Bits)widen_signed(keep); }
};

template <>
struct Format<BFloat16> {
  using Bits = U16;
#if MMPEFT_LANES == 16
  // One permutation that leaves the lower halves zero, instead of a conversion and a shift.
  static MMPEFT_INLINE F32 widen(Bits bits) {
    const U32 upper_halves = U32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16;
    const __m512i halves = _mm512_castsi256_si512((__m256i)bits);
    return (F32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)upper_halves, halves);
  }
#else
  static MMPEFT_INLINE F32 widen(Bits bits) { return (F32)(widen_bits(bits) << 16); }
#endif
  static MMPEFT_INLINE U32 rounded_bits(F32 v) {
    U32 bits = (U32)v;
    U32 rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
    // Rounding a nan's bits could carry into infinity or zero.
    return v == v ? rounded : bits | 0x400000u;
  }
#if defined(MMPEFT_NATIVE_BF16)
  // The processor's own conversion takes subnormal floats, below 1.2e-38, for zeros.
  static MMPEFT_INLINE Bits narrow(F32 v) { return (Bits)_mm512_cvtneps_pbh((__m512)v); }
  static MMPEFT_INLINE F32 round(F32 v) { return widen(narrow(v)); }
#else
  static MMPEFT_INLINE Bits narrow(F32 v) { return narrow_bits(rounded_bits(v) >> 16); }
  static MMPEFT_INLINE F32 round(F32 v) { return (F32)(rounded_bits(v) & 0xffff0000u); }
#endif
  static MMPEFT_INLINE Bits mask(I16 keep) { return (Bits)keep; }
};

template <>
struct Format<Float16> {
  using Bits = U16;
  static MMPEFT_INLINE F32 widen(Bits bits) { return widen_half(bits); }
  static MMPEFT_INLINE Bits narrow(F32 v) { return narrow_half(v); }
  static MMPEFT_INLINE F32 round(F32 v) { return widen_half(narrow_half(v)); }
  static MMPEFT_INLINE Bits mask(I16 keep) { return (Bits)keep; }
};

template <typename T, typename Part>
MMPEFT_INLINE F32 load(const T* p, Part part) {
  return Format<T>::widen(load_raw<typename Format<T>::Bits>(p, part));
}
template <typename T, typename Part>
MMPEFT_INLINE void store(T* p, F32 v, Part part) {
  store_raw(p, Format<T>::narrow(v), part);
}
template <typename T>
MMPEFT_INLINE F32 rounded(F32 v) {
  return Format<T>::round(v);
}

// Asks for the cache line at p ahead of its use, which may be never.
MMPEFT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <typename T, typename R>
MMPEFT_INLINE const T* row_of(const R& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}
template <typename T, typename R>
MMPEFT_INLINE T* row_to_write(const R& rows, int64_t row) {
  return rows.data ? static_cast<T*>(rows.data) + row * rows.stride : nullptr;
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
