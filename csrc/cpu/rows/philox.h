// Dropout bits: Philox4x32-7 (Salmon et al., SC'11). Element (m, k) is lane k % 8 of counter (k // 8, m, stream, 0)
// under key `seed`; the bits are those of mmpeft_fast.ops.dropout.
#pragma once

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/rows/vec.h"

namespace mmpeft {
namespace MMPEFT_ISA {

// Counters live in 64-bit lanes, so that one multiplication gives both halves of a product. Upper halves may hold
// anything where only the lower ones are used.
constexpr int kCounters = kLanes / 2;
typedef uint64_t U64 __attribute__((vector_size(8 * kCounters)));
typedef int16_t Lanes16 __attribute__((vector_size(8 * kCounters)));

// Products of the lower 32 bits.
#if MMPEFT_LANES == 16
MMPEFT_INLINE U64 multiply_low(U64 a, U64 b) { return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b); }
#elif MMPEFT_LANES == 8
MMPEFT_INLINE U64 multiply_low(U64 a, U64 b) { return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__x86_64__)
MMPEFT_INLINE U64 multiply_low(U64 a, U64 b) { return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
MMPEFT_INLINE U64 multiply_low(U64 a, U64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

// Independent chains that hide the latency of the multiplications.
constexpr int kChains = kLanes == 16 ? 4 : 2;

// Columns whose bits are generated at a time: small enough for the first-level cache.
constexpr int64_t kDropoutBlock = 512;
static_assert(kDropoutBlock % (8 * kCounters * kChains) == 0, "whole steps of counters");

// All bits set where an element of columns [column, column + num_columns) is kept, none where it is dropped.
// `column` is a multiple of 8; keep has room for num_columns rounded up to kDropoutBlock.
inline void keep_lanes(const Dropout& dropout, int64_t row, int64_t column, int64_t num_columns, int16_t* keep) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  U64 first{};
  for (int i = 0; i < kCounters; ++i) first[i] = i;
  const U64 low_half = U64{} + 0xffffffffu;
  const U64 multiplier_0 = U64{} + kMultiplier0, multiplier_1 = U64{} + kMultiplier1;
  const Lanes16 below = Lanes16{} + static_cast<int16_t>(dropout.threshold - 1);
  for (int64_t k = 0; k < num_columns; k += 8 * kCounters * kChains) {
    U64 c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int i = 0; i < kChains; ++i) {
      c0[i] = first + static_cast<uint64_t>((column + k) / 8 + i * kCounters);
      c1[i] = U64{} + static_cast<uint64_t>(static_cast<uint32_t>(row));
      c2[i] = U64{} + static_cast<uint64_t>(dropout.stream);
      c3[i] = U64{};
    }
    uint32_t key_0 = static_cast<uint32_t>(dropout.seed), key_1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      const U64 k0 = U64{} + static_cast<uint64_t>(key_0), k1 = U64{} + static_cast<uint64_t>(key_1);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        U64 product_0 = multiply_low(c0[i], multiplier_0), product_1 = multiply_low(c2[i], multiplier_1);
        c0[i] = (product_1 >> 32) ^ c1[i] ^ k0;
        c2[i] = (product_0 >> 32) ^ c3[i] ^ k1;
        c1[i] = product_1;
        c3[i] = product_0;
      }
      key_0 += kWeyl0;
      key_1 += kWeyl1;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      // Words 0 and 1 of every counter, words 2 and 3, then both in turn.
      U64 low = (c0[i] & low_half) | (c1[i] << 32), high = (c2[i] & low_half) | (c3[i] << 32);
#if MMPEFT_LANES == 16
      U64 out_0 = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
      U64 out_1 = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
#elif MMPEFT_LANES == 8
      U64 out_0 = __builtin_shufflevector(low, high, 0, 4, 1, 5);
      U64 out_1 = __builtin_shufflevector(low, high, 2, 6, 3, 7);
#else
      U64 out_0 = __builtin_shufflevector(low, high, 0, 2);
      U64 out_1 = __builtin_shufflevector(low, high, 1, 3);
#endif
      int16_t* to = keep + k + i * 8 * kCounters;
      Lanes16 keep_0 = (Lanes16)out_0 > below, keep_1 = (Lanes16)out_1 > below;
      memcpy(to, &keep_0, sizeof keep_0);
      memcpy(to + 4 * kCounters, &keep_1, sizeof keep_1);
    }
  }
}

// Calls block(first column, end column, keep) for the blocks of a row; keep[k - first] belongs to column k. Without
// dropout it is one block and keep is null.
template <typename Block>
MMPEFT_INLINE void for_dropout_blocks(const Dropout& dropout, int64_t row, int64_t width, Block block) {
  if (!dropout.active) {
    block(static_cast<int64_t>(0), width, static_cast<const int16_t*>(nullptr));
    return;
  }
  alignas(64) int16_t keep[kDropoutBlock + kLanes];
  for (int64_t k = 0; k < width; k += kDropoutBlock) {
    const int64_t end = k + kDropoutBlock < width ? k + kDropoutBlock : width;
    keep_lanes(dropout, row, k, end - k, keep);
    block(k, end, static_cast<const int16_t*>(keep));
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
