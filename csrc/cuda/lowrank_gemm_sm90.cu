// Persistent, warp-specialised low-rank GEMM: one producer thread feeds a ring of shared-memory stages by TMA, two
// warpgroups multiply them by wgmma. The low-rank steps come first and are scaled in the accumulator, so that s costs
// nothing and needs no rounding; the producer only changes tensor maps for them.
//
// A block has 128 rows; each consumer warpgroup owns 64 of them. Ragged M, N, K and ranks are zeros that TMA fills in.

#include <cuda.h>
#include <cuda_runtime.h>

#include "element.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "lowrank_gemm.h"
#include "shared_layout.h"
#include "tensor_map.h"

namespace mmpeft::cuda {
namespace {

constexpr int kBlockM = 128;
constexpr int kBlockK = 64;                 // 128 bytes: the width of a swizzled row
constexpr int kInstructionK = 16;           // depth of one wgmma
constexpr int kRowBytes = 128;
constexpr int kConsumers = 2;               // warpgroups
constexpr int kConsumerRows = kBlockM / kConsumers;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBoxBytes = kConsumerRows * kRowBytes;  // 64 x 64 elements
constexpr int kSwizzleAlignment = 1024;
// 168 registers a thread at the launch (65536 / 384, in steps of 8): 128 * 40 + 256 * 232 is the same sum.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

struct Params {
  CUtensorMap x, weight, residual, out;
  CUtensorMap z[kMaxSegments], u[kMaxSegments];  // one a segment: its own ranks and columns, zeros beyond them
  SegmentTable segments;
  FloatArray bias, scale;
  int num_rows, num_out, depth;
  float scaling;
  bool has_residual;
};

template <int block_n>
struct SharedLayout {
  static constexpr int kStages = block_n == 256 ? 3 : 4;
  static constexpr int kABytes = kBlockM * kRowBytes;
  static constexpr int kBBytes = block_n * kRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kOutBytes = kConsumerRows * block_n * 2;  // of one consumer
  static constexpr int kVectorBytes = block_n * 4;               // bias or scale, of one consumer

  static constexpr int kOut = kStages * kStageBytes;
  static constexpr int kBias = kOut + kConsumers * kOutBytes;
  static constexpr int kScale = kBias + kConsumers * kVectorBytes;
  static constexpr int kFull = kScale + kConsumers * kVectorBytes;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kResidual = kEmpty + kStages * 8;
  static constexpr int kBytes = kResidual + kConsumers * 8;
};

// A position in the ring of stages; producer and consumers advance through the same sequence.
template <int num_stages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == num_stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct TileBounds {
  int row, column;
  int segment_idx;
};

template <int block_n>
__device__ TileBounds tile_bounds(const Params& params, int tile_idx, int num_tiles_m) {
  const TilePosition position = grouped_tile(tile_idx, num_tiles_m, params.segments.num_tiles);
  const int segment_idx = segment_of_tile(params.segments, position.tile_n);
  const Segment& segment = params.segments.segments[segment_idx];
  return {position.tile_m * kBlockM, first_column_of_tile(segment, position.tile_n, block_n), segment_idx};
}

// Loads the steps of one product: a [rows, depth] from `row` on, b from `column` on.
template <int block_n, bool transposed>
__device__ void produce(Ring<SharedLayout<block_n>::kStages>& ring, uint32_t shared, const CUtensorMap* a,
                        const CUtensorMap* b, int row, int column, int depth) {
  using Layout = SharedLayout<block_n>;
  for (int k = 0; k < depth; k += kBlockK) {
    const uint32_t full = shared + Layout::kFull + ring.stage * 8;
    const uint32_t empty = shared + Layout::kEmpty + ring.stage * 8;
    const uint32_t stage = shared + ring.stage * Layout::kStageBytes;
    // In the first round the stages are free: the wait is for the phase before the first.
    mbarrier_wait(empty, ring.phase ^ 1);
    mbarrier_arrive_and_expect(full, Layout::kStageBytes);
    tma_load(stage, a, k, row, full);
    if constexpr (transposed) {
      tma_load(stage + Layout::kABytes, b, k, column, full);
    } else {
      for (int box = 0; box < block_n / kStoreColumns; ++box) {
        tma_load(stage + Layout::kABytes + box * kBoxBytes, b, column + box * kStoreColumns, k, full);
      }
    }
    ring.advance();
  }
}

// acc += the product whose steps the producer loads. Returns with all of it in the accumulator and all stages released.
// Beyond the depth a stage holds zeros; skip_zeros leaves them out, so that a rank of 16 is one instruction, not four.
template <typename Element, int block_n, bool transposed, bool skip_zeros>
__device__ void consume(float (&acc)[block_n / 2], Ring<SharedLayout<block_n>::kStages>& ring, uint32_t shared,
                        int consumer, int depth) {
  using Layout = SharedLayout<block_n>;
  // K contiguous: 8 rows of 128 bytes make 1024. N contiguous: 8 k of 128 bytes, and the next 64 columns are a box on.
  constexpr int kStrideOffset = 8 * kRowBytes;
  constexpr int kLeadingOffset = transposed ? 0 : kBoxBytes;
  // What 16 of k are in a descriptor's address field, in units of 16 bytes: 32 bytes of a row, or 16 rows.
  constexpr int kAdvanceA = kInstructionK * 2 / 16;
  constexpr int kAdvanceB = transposed ? kAdvanceA : kInstructionK * kRowBytes / 16;
  const bool first_lane = threadIdx.x % 32 == 0;
  uint32_t previous_empty = 0;
  for (int k = 0; k < depth; k += kBlockK) {
    const uint32_t stage = shared + ring.stage * Layout::kStageBytes;
    const uint64_t a = matrix_descriptor(stage + consumer * kBoxBytes, 0, kStrideOffset);
    const uint64_t b = matrix_descriptor(stage + Layout::kABytes, kLeadingOffset, kStrideOffset);
    mbarrier_wait(shared + Layout::kFull + ring.stage * 8, ring.phase);
    pin_registers(acc);
    if constexpr (skip_zeros) {
      // One group each: the compiler wants no branch between the instructions of a group.
      for (int i = 0; i < kBlockK / kInstructionK && k + i * kInstructionK < depth; ++i) {
        wgmma_fence();
        wgmma<Element, !transposed>(acc, a + i * kAdvanceA, b + i * kAdvanceB);
        wgmma_commit();
      }
    } else {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBlockK / kInstructionK; ++i) {
        wgmma<Element, !transposed>(acc, a + i * kAdvanceA, b + i * kAdvanceB);
      }
      wgmma_commit();
    }
    // At most the newest group stays in flight, and it is of this step: the stage of the step before has been read.
    wgmma_wait<1>();
    if (k > 0 && first_lane) mbarrier_arrive(previous_empty);
    previous_empty = shared + Layout::kEmpty + ring.stage * 8;
    ring.advance();
  }
  wgmma_wait<0>();
  pin_registers(acc);
  if (depth > 0 && first_lane) mbarrier_arrive(previous_empty);
}

// (acc + bias) * scale (+ residual) into this consumer's half of the tile's output.
template <typename Element, int block_n>
__device__ void finish_tile(const float (&acc)[block_n / 2], char* out_tile, const float* bias, const float* scale,
                            bool has_residual) {
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x % kWarpgroup / 32 * 16;
#pragma unroll
  for (int i = 0; i < block_n / 2; i += 2) {
    const int row = warp_row + accumulator_row(lane, i), column = accumulator_col(lane, i);
    // Neighbours in a row; a box holds 64 columns of 64 rows.
    char* pair = out_tile + column / kStoreColumns * kBoxBytes + swizzled_offset(row, column % kStoreColumns * 2);
    float low = (acc[i] + bias[column]) * scale[column];
    float high = (acc[i + 1] + bias[column + 1]) * scale[column + 1];
    Element* values = reinterpret_cast<Element*>(pair);
    if (has_residual) {
      low += to_float(values[0]);
      high += to_float(values[1]);
    }
    struct alignas(4) Pair {
      Element low, high;
    };
    *reinterpret_cast<Pair*>(pair) = {from_float<Element>(low), from_float<Element>(high)};
  }
}

template <int block_n, bool transposed>
__device__ void run_producer(const Params& params, uint32_t shared, int num_tiles_m) {
  Ring<SharedLayout<block_n>::kStages> ring;
  const int num_tiles = num_tiles_m * params.segments.num_tiles;
  for (int tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
    const TileBounds tile = tile_bounds<block_n>(params, tile_idx, num_tiles_m);
    const Segment& segment = params.segments.segments[tile.segment_idx];
    produce<block_n, transposed>(ring, shared, &params.z[tile.segment_idx], &params.u[tile.segment_idx], tile.row,
                                 tile.column - segment.first_column, segment.num_ranks);
    produce<block_n, transposed>(ring, shared, &params.x, &params.weight, tile.row, tile.column, params.depth);
  }
}

template <typename Element, int block_n, bool transposed>
__device__ void run_consumer(const Params& params, char* shared_pointer, uint32_t shared, int consumer,
                             int num_tiles_m) {
  using Layout = SharedLayout<block_n>;
  Ring<Layout::kStages> ring;
  uint32_t residual_phase = 0;
  const int thread = threadIdx.x % kWarpgroup;
  const int out_offset = Layout::kOut + consumer * Layout::kOutBytes;
  const uint32_t residual_barrier = shared + Layout::kResidual + consumer * 8;
  float* bias = reinterpret_cast<float*>(shared_pointer + Layout::kBias + consumer * Layout::kVectorBytes);
  float* scale = reinterpret_cast<float*>(shared_pointer + Layout::kScale + consumer * Layout::kVectorBytes);
  const int num_tiles = num_tiles_m * params.segments.num_tiles;
  for (int tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
    const TileBounds tile = tile_bounds<block_n>(params, tile_idx, num_tiles_m);
    const Segment& segment = params.segments.segments[tile.segment_idx];
    const int row = tile.row + consumer * kConsumerRows;
    const int columns_left = segment.end_column - tile.column;
    const int num_boxes = ceil_div(columns_left < block_n ? columns_left : block_n, kStoreColumns);

    // Phase 1: what the epilogue needs, on its way while the product runs.
    if (thread == 0) {
      tma_store_wait_read();
      if (params.has_residual) {
        mbarrier_arrive_and_expect(residual_barrier, num_boxes * kBoxBytes);
        for (int box = 0; box < num_boxes; ++box) {
          tma_load(shared + out_offset + box * kBoxBytes, &params.residual, tile.column + box * kStoreColumns, row,
                   residual_barrier);
        }
      }
    }
    for (int i = thread; i < block_n; i += kWarpgroup) {
      const bool inside = i < columns_left;
      bias[i] = params.bias.data != nullptr && inside ? load_float(params.bias, tile.column + i) : 0.0f;
      scale[i] = params.scale.data != nullptr && inside ? load_float(params.scale, tile.column + i) : 1.0f;
    }

    // Phase 2: the low-rank steps of this segment, then the frozen GEMM.
    float acc[block_n / 2];
#pragma unroll
    for (int i = 0; i < block_n / 2; ++i) acc[i] = 0.0f;
    if (segment.num_ranks > 0) {
      consume<Element, block_n, transposed, true>(acc, ring, shared, consumer, segment.num_ranks);
#pragma unroll
      for (int i = 0; i < block_n / 2; ++i) acc[i] *= params.scaling;
    }
    consume<Element, block_n, transposed, false>(acc, ring, shared, consumer, params.depth);

    // Phase 3: the epilogue, through shared memory. The first barrier publishes bias and scale and says that the tile
    // before has left the buffer; the second comes before the store reads what all threads wrote.
    const int barrier = 1 + consumer;
    warpgroup_sync(barrier);
    if (params.has_residual) {
      mbarrier_wait(residual_barrier, residual_phase);
      residual_phase ^= 1;
    }
    finish_tile<Element, block_n>(acc, shared_pointer + out_offset, bias, scale, params.has_residual);
    async_proxy_fence();
    warpgroup_sync(barrier);
    if (thread == 0) {
      for (int box = 0; box < num_boxes; ++box) {
        tma_store(&params.out, shared + out_offset + box * kBoxBytes, tile.column + box * kStoreColumns, row);
      }
      tma_store_commit();
    }
  }
  // Shared memory must outlive the last store's reads.
  if (thread == 0) tma_store_wait_read();
}

template <typename Element, int block_n, bool transposed>
__global__ void __launch_bounds__(kThreads, 1) lowrank_gemm_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  using Layout = SharedLayout<block_n>;
  const uint32_t unaligned = shared_address(dynamic_shared());
  const uint32_t shared = (unaligned + kSwizzleAlignment - 1) / kSwizzleAlignment * kSwizzleAlignment;
  char* shared_pointer = dynamic_shared() + (shared - unaligned);
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int num_tiles_m = ceil_div(params.num_rows, kBlockM);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Layout::kStages; ++stage) {
      mbarrier_init(shared + Layout::kFull + stage * 8, 1);
      mbarrier_init(shared + Layout::kEmpty + stage * 8, kConsumers * kWarpgroup / 32);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      mbarrier_init(shared + Layout::kResidual + consumer * 8, 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == kConsumers) {
    give_registers_up<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) run_producer<block_n, transposed>(params, shared, num_tiles_m);
  } else {
    take_registers<kConsumerRegisters>();
    run_consumer<Element, block_n, transposed>(params, shared_pointer, shared, warpgroup, num_tiles_m);
  }
#else
  __trap();  // built for another target than sm_90a: an error of the launch, not an output of nothing
#endif
}

cudaError_t encode_all(Params& params, const LowRankGemm& gemm) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) return cudaErrorNotSupported;
  const int weight_box_rows = gemm.transposed ? gemm.block_n : kBlockK;
  cudaError_t status = cudaSuccess;
  const auto encode = [&](CUtensorMap& map, const Matrix& matrix, int box_rows) {
    if (status != cudaSuccess) return;
    status = encode_matrix(encode_tiled, map, gemm.dtype, matrix.data, matrix.rows, matrix.cols, matrix.stride,
                           box_rows);
  };
  encode(params.x, gemm.x, kBlockM);
  encode(params.weight, gemm.weight, weight_box_rows);
  encode(params.out, gemm.out, kConsumerRows);
  if (params.has_residual) encode(params.residual, gemm.residual, kConsumerRows);
  for (int i = 0; i < gemm.segments.num_segments; ++i) {
    const Segment& segment = gemm.segments.segments[i];
    if (segment.num_ranks == 0) continue;
    const int num_columns = segment.end_column - segment.first_column;
    uint16_t* z = static_cast<uint16_t*>(gemm.z.data) + segment.first_rank;
    uint16_t* u = static_cast<uint16_t*>(gemm.u.data) + (gemm.transposed ? segment.first_column * gemm.u.stride : 0);
    const int u_rows = gemm.transposed ? num_columns : segment.num_ranks;
    const int u_cols = gemm.transposed ? segment.num_ranks : num_columns;
    encode(params.z[i], {z, gemm.x.rows, segment.num_ranks, gemm.z.stride}, kBlockM);
    encode(params.u[i], {u, u_rows, u_cols, gemm.u.stride}, weight_box_rows);
  }
  return status;
}

template <typename Element, int block_n, bool transposed>
cudaError_t launch_with(const LowRankGemm& gemm, const Params& params, cudaStream_t stream) {
  constexpr int kSharedBytes = SharedLayout<block_n>::kBytes + kSwizzleAlignment;
  const int num_tiles = ceil_div(gemm.out.rows, kBlockM) * gemm.segments.num_tiles;
  const int num_programs = num_tiles < gemm.num_programs ? num_tiles : gemm.num_programs;
  return launch(lowrank_gemm_kernel<Element, block_n, transposed>, dim3(num_programs), kThreads, kSharedBytes, stream,
                params);
}

template <typename Element>
cudaError_t launch_typed(const LowRankGemm& gemm, const Params& params, cudaStream_t stream) {
  if (gemm.transposed) {
    return gemm.block_n == 256 ? launch_with<Element, 256, true>(gemm, params, stream)
                               : launch_with<Element, 128, true>(gemm, params, stream);
  }
  return gemm.block_n == 256 ? launch_with<Element, 256, false>(gemm, params, stream)
                             : launch_with<Element, 128, false>(gemm, params, stream);
}

}  // namespace

cudaError_t launch_lowrank_gemm_sm90(const LowRankGemm& gemm, cudaStream_t stream) {
  const bool known_tile = gemm.block_n == 128 || gemm.block_n == 256;
  if (gemm.dtype == DType::kFloat32 || !known_tile || gemm.num_programs < 1) return cudaErrorInvalidValue;
  if (!gemm.transposed && gemm.segments.num_segments != 1) return cudaErrorInvalidValue;
  for (int i = 0; i + 1 < gemm.segments.num_segments; ++i) {
    if (gemm.segments.segments[i].end_column % kStoreColumns != 0) return cudaErrorInvalidValue;
  }
  Params params = {};
  params.segments = gemm.segments;
  params.bias = gemm.bias;
  params.scale = gemm.scale;
  params.num_rows = gemm.out.rows;
  params.num_out = gemm.out.cols;
  params.depth = gemm.x.cols;
  params.scaling = gemm.scaling;
  params.has_residual = gemm.residual.data != nullptr;
  const cudaError_t status = encode_all(params, gemm);
  if (status != cudaSuccess) return status;
  return gemm.dtype == DType::kFloat16 ? launch_typed<__half>(gemm, params, stream)
                                       : launch_typed<__nv_bfloat16>(gemm, params, stream);
}

}  // namespace mmpeft::cuda
