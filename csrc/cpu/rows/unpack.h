// Packed weights as numbers.
//
//   8 bits: out = value scale, a scale a row
//   4 bits: out = code[index] scale, two indices a byte, the first in its upper half; a scale for every block of
//           elements, counted over all of the matrix
#pragma once

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/rows/vec.h"

namespace mmpeft {
namespace MMPEFT_ISA {

template <typename T>
void unpack_8bit(const Unpack8BitArgs& given, int64_t begin, int64_t end) {
  typedef int8_t I8 __attribute__((vector_size(kLanes)));
  const Unpack8BitArgs args = given;  // a copy that no store can change
  for (int64_t row = begin; row < end; ++row) {
    const int8_t* values = row_of<int8_t>(args.values, row);
    T* out = row_to_write<T>(args.out, row);
    const float scale = args.scales[row];
    for_columns(0, args.width, [&](int64_t k, auto part) {
      store(out + k, __builtin_convertvector(load_raw<I8>(values + k, part), F32) * scale, part);
    });
  }
}

// The table's numbers at the kLanes indices that begin at a byte.
MMPEFT_INLINE F32 looked_up(const float* code, const uint8_t* bytes) {
#if MMPEFT_LANES == 16
  const __m128i given = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(given, 4), _mm_set1_epi8(15));
  const __m128i indices = _mm_unpacklo_epi8(upper, _mm_and_si128(given, _mm_set1_epi8(15)));
  return (F32)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, indices),
                                          (__m512)load_raw<F32>(code, Whole{}));
#elif MMPEFT_LANES == 8
  int32_t four;
  memcpy(&four, bytes, sizeof four);
  const __m128i given = _mm_cvtsi32_si128(four);
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(given, 4), _mm_set1_epi8(15));
  const __m128i both = _mm_unpacklo_epi8(upper, _mm_and_si128(given, _mm_set1_epi8(15)));
  const __m256i indices = _mm256_cvtepu8_epi32(both);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code), indices);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code + 8), indices);
  return (F32)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
#else
  return F32{code[bytes[0] >> 4], code[bytes[0] & 15], code[bytes[1] >> 4], code[bytes[1] & 15]};
#endif
}

template <typename T>
void unpack_4bit(const Unpack4BitArgs& given, int64_t begin, int64_t end) {
  const Unpack4BitArgs args = given;  // a copy that no store can change
  for (int64_t row = begin; row < end; ++row) {
    T* out = row_to_write<T>(args.out, row);
    const int64_t first = row * args.width;
    if (args.width % kLanes == 0) {
      // A vector begins with a byte and lies in one block.
      for (int64_t k = 0; k < args.width; k += kLanes) {
        const float scale = args.scales[(first + k) >> args.log2_blocksize];
        store(out + k, looked_up(args.code, args.packed + (first + k) / 2) * scale, Whole{});
      }
      continue;
    }
    for_columns(0, args.width, [&](int64_t k, auto part) {
      float values[kLanes] = {};
      const int64_t n = args.width - k < kLanes ? args.width - k : kLanes;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = first + k + i;
        const uint8_t byte = args.packed[at / 2];
        values[i] = args.code[at % 2 ? byte & 15 : byte >> 4] * args.scales[at >> args.log2_blocksize];
      }
      store(out + k, load_raw<F32>(values, Whole{}), part);
    });
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
