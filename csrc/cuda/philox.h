// Counter-based dropout masks: the bits of mmpeft_fast/ops/dropout.py, generated where they are used.
// Philox4x32-7 (Salmon et al., SC'11). Element (m, k) is lane k % 8 of counter (k / 8, m, stream, 0) under key `seed`.
#pragma once

#include "dtype.h"

namespace mmpeft::cuda {

struct DropoutLanes {
  uint32_t words[4];  // word w holds lanes 2w (low half) and 2w + 1 (high half)
};

MMPEFT_HOST_DEVICE inline DropoutLanes philox_4x32_7(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                                     uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product_0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The lanes of columns [8 * block, 8 * block + 8) of a row.
MMPEFT_HOST_DEVICE inline DropoutLanes dropout_lanes(uint64_t seed, int stream, int row, int block) {
  return philox_4x32_7(static_cast<uint32_t>(block), static_cast<uint32_t>(row), static_cast<uint32_t>(stream), 0u,
                       seed);
}

// threshold = round(p * 2^16) - 2^15.
MMPEFT_HOST_DEVICE inline bool is_dropped(const DropoutLanes& lanes, int lane, int threshold) {
  return static_cast<int16_t>(lanes.words[lane / 2] >> (16 * (lane % 2))) < threshold;
}

}  // namespace mmpeft::cuda
