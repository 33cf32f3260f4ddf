// Where elements lie in shared memory and in fragments: pure index arithmetic, checked on the host by the tests.
// PTX ISA: "Swizzling modes", "Matrix descriptor format" (wgmma), "ldmatrix".
#pragma once

#include "dtype.h"

namespace mmpeft::cuda {

// CU_TENSOR_MAP_SWIZZLE_128B on rows of 128 bytes: the 16-byte chunk index is xored with the row index modulo 8.
// Base addresses are multiples of 1024, so that row and address agree in the bits that are xored.
MMPEFT_HOST_DEVICE constexpr int swizzled_offset(int row, int byte_in_row) {
  return row * 128 + (byte_in_row ^ ((row & 7) << 4));
}

// A wgmma matrix descriptor in the 128-byte swizzle mode. All quantities in bytes, multiples of 16.
//   operand with K contiguous: stride_offset from 8 rows to the next 8; leading_offset is not used.
//   operand with N contiguous: stride_offset from 8 k to the next 8; leading_offset from 64 columns to the next 64.
MMPEFT_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t shared_address, int leading_offset,
                                                        int stride_offset) {
  constexpr uint64_t kSwizzle128B = 1;
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading_offset >> 4) << 16 |
         static_cast<uint64_t>(stride_offset >> 4) << 32 | kSwizzle128B << 62;
}

struct LaneAddress {
  int row, col;  // of the 8-element row that this lane hands to ldmatrix
};

// ldmatrix.x4 for the A fragment (16 x 16) of mma.m16n8k16 from shared memory that holds A by rows.
MMPEFT_HOST_DEVICE constexpr LaneAddress a_lane_address(int lane) { return {lane % 16, lane / 16 * 8}; }

// ldmatrix.x4.trans for the A fragment from shared memory that holds A^T by rows: row is k, col is m.
MMPEFT_HOST_DEVICE constexpr LaneAddress a_transposed_lane_address(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

// ldmatrix.x2 for the B fragment (16 x 8) from shared memory that holds B^T by rows: row is n, col is k.
MMPEFT_HOST_DEVICE constexpr LaneAddress b_transposed_lane_address(int lane) { return {lane % 8, lane / 8 % 2 * 8}; }

// ldmatrix.x2.trans for the B fragment from shared memory that holds B by rows: row is k, col is n.
MMPEFT_HOST_DEVICE constexpr LaneAddress b_lane_address(int lane) { return {lane % 16, 0}; }

// Accumulator element i of a lane, of mma.m16n8k16 (i < 4) and, for each warp's 16 rows, of wgmma.m64nNk16.
MMPEFT_HOST_DEVICE constexpr int accumulator_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
MMPEFT_HOST_DEVICE constexpr int accumulator_col(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

}  // namespace mmpeft::cuda
