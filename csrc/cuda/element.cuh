// Elements and groups of eight of them: conversion to float32 and back (to nearest even), loads and stores that take
// 16 bytes at once where address and bounds allow, element by element elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "dtype.h"
#include "warp_mma.cuh"

namespace mmpeft::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Element>
__device__ inline Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// `value` as it would be after a store in Element: where the torch provider rounds, the kernels round.
template <typename Element>
__device__ inline float rounded(float value) {
  return to_float(from_float<Element>(value));
}

template <typename Element>
struct TypeCode;
template <>
struct TypeCode<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct TypeCode<__half> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct TypeCode<__nv_bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};

__device__ inline float load_float(const FloatArray& array, int64_t index) {
  if (array.dtype == DType::kFloat32) return static_cast<const float*>(array.data)[index];
  if (array.dtype == DType::kFloat16) return to_float(static_cast<const __half*>(array.data)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(array.data)[index]);
}

__device__ inline void store_float(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[index] = from_float<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
  }
}

// Eight neighbours of a row: what 16 bytes of a half precision hold.
constexpr int kChunk = 8;

template <typename Element>
struct alignas(16) Chunk {
  Element values[kChunk];
};

struct Floats {
  float values[kChunk];
};

__device__ inline bool is_16_byte_aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// The first `count` of eight elements, zeros behind them; count may be negative or above eight.
template <typename Element>
__device__ inline Chunk<Element> load_chunk(const Element* source, int count) {
  if (count >= kChunk && is_16_byte_aligned(source)) return *reinterpret_cast<const Chunk<Element>*>(source);
  Chunk<Element> chunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) chunk.values[i] = i < count ? source[i] : from_float<Element>(0.0f);
  return chunk;
}

template <typename Element>
__device__ inline Floats to_floats(const Chunk<Element>& chunk) {
  Floats wide;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) wide.values[i] = to_float(chunk.values[i]);
  return wide;
}

template <typename Element>
__device__ inline Chunk<Element> to_chunk(const Floats& wide) {
  Chunk<Element> chunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) chunk.values[i] = from_float<Element>(wide.values[i]);
  return chunk;
}

// Eight elements of an array from `index` on, the first `count` of them, zeros behind.
__device__ inline Floats load_floats(const FloatArray& array, int64_t index, int count) {
  if (array.dtype == DType::kFloat16) {
    return to_floats(load_chunk(static_cast<const __half*>(array.data) + index, count));
  }
  if (array.dtype == DType::kBFloat16) {
    return to_floats(load_chunk(static_cast<const __nv_bfloat16*>(array.data) + index, count));
  }
  Floats wide;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    wide.values[i] = i < count ? static_cast<const float*>(array.data)[index + i] : 0.0f;
  }
  return wide;
}

// Columns between rows of a shared tile: 16 bytes of padding let ldmatrix read eight rows without a bank conflict.
template <int cols>
constexpr int kTileStride = cols + kChunk;

// Copies a [rows, cols] tile at (row, col) of `source` into shared memory as Element, zeros from end_row and end_col
// on. Chunks go by cp.async where they can: commit and wait for them, then synchronise the block.
template <typename Element, int rows, int cols, int num_threads>
__device__ inline void stage_tile(Element* shared, const FloatArray& source, int64_t row, int col, int64_t end_row,
                                  int end_col) {
  constexpr int kChunks = cols / kChunk;
  for (int i = threadIdx.x; i < rows * kChunks; i += num_threads) {
    const int tile_row = i / kChunks, tile_col = i % kChunks * kChunk;
    Element* target = shared + tile_row * kTileStride<cols> + tile_col;
    const int count = row + tile_row < end_row ? end_col - (col + tile_col) : 0;
    const int64_t index = (row + tile_row) * source.stride + col + tile_col;
    const Element* from = static_cast<const Element*>(source.data) + index;
    if (source.dtype == TypeCode<Element>::value && count >= kChunk && is_16_byte_aligned(from)) {
      cp_async_16(target, from);
    } else {
      *reinterpret_cast<Chunk<Element>*>(target) = to_chunk<Element>(load_floats(source, index, count));
    }
  }
}

}  // namespace mmpeft::cuda
