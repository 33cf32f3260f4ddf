// Tensor maps (what TMA needs to know of a matrix), made by the driver's encoder without linking the driver's library.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace mmpeft::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Null where the driver does not have it.
inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned int kVersion = 12000;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &result);
  const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

// A [rows, cols] matrix of 16-bit elements with `stride` elements between rows, for boxes of 64 columns and `box_rows`
// rows in shared memory with the 128-byte swizzle; elements outside of the matrix read as 0 and are not written.
inline cudaError_t encode_matrix(EncodeTiled encode_tiled, CUtensorMap& map, DType dtype, const void* data, int rows,
                                 int cols, int64_t stride, int box_rows) {
  if (rows < 1 || cols < 1) return cudaErrorInvalidValue;
  // The stride of a single row has no meaning, and TMA still wants a valid one.
  const int64_t stride_bytes = rows > 1 ? stride * 2 : ceil_div(int64_t{cols}, int64_t{8}) * 16;
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride_bytes % 16 != 0) return cudaErrorMisalignedAddress;
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode_tiled(&map, type, 2, const_cast<void*>(data), sizes, strides, box, element_strides,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mmpeft::cuda
