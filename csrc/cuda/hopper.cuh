// Instructions of sm_90a as functions: mbarrier, tensor copies (TMA), wgmma, register reallocation, named barriers.
// PTX ISA: "mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions", "setmaxnreg".
// Shared memory is named by 32-bit addresses. Nothing here chooses or checks.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "warp_mma.cuh"

namespace mmpeft::cuda {

constexpr int kWarpgroup = 128;  // threads

// mbarrier: a phase ends when `count` arrivals and all expected bytes have come.

__device__ inline void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy; then synchronise the block.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and adds `bytes` to what the current phase waits for.
__device__ inline void mbarrier_arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of `parity`; the phase before the first counts as one of parity 1 that has ended.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}

// TMA: whole boxes; zeros come from outside of the tensor and nothing is written there.

// The box at (inner, outer) into shared memory; its bytes, those outside included, arrive on the barrier.
__device__ inline void tma_load(uint32_t shared, const CUtensorMap* map, int inner, int outer, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared), "l"(map), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

__device__ inline void tma_store(const CUtensorMap* map, uint32_t shared, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(inner), "r"(outer), "r"(shared)
               : "memory");
}

__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all stores of this thread have read their shared memory.
__device__ inline void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Orders this thread's accesses to shared memory before asynchronous ones that follow a synchronisation.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Warpgroups.

template <int registers>
__device__ inline void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Synchronises the threads of one warpgroup. Barrier 0 is __syncthreads.
__device__ inline void warpgroup_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kWarpgroup) : "memory");
}

// Before the first wgmma and whenever other instructions have touched its accumulators.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses to the accumulators across this point.
template <int count>
__device__ inline void pin_registers(float (&acc)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define MMPEFT_ACC_4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define MMPEFT_ACC_16(i) MMPEFT_ACC_4(i), MMPEFT_ACC_4(i + 4), MMPEFT_ACC_4(i + 8), MMPEFT_ACC_4(i + 12)

#define MMPEFT_WGMMA_N128(TYPE)                                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                      \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                     \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                       \
               "}, %64, %65, 1, 1, 1, 0, %66;"                                                                        \
               : MMPEFT_ACC_16(0), MMPEFT_ACC_16(16), MMPEFT_ACC_16(32), MMPEFT_ACC_16(48)                            \
               : "l"(a), "l"(b), "n"(static_cast<int>(b_has_contiguous_n)))

#define MMPEFT_WGMMA_N256(TYPE)                                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                                      \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                     \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                     \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                     \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                     \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "         \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"       \
               "}, %128, %129, 1, 1, 1, 0, %130;"                                                                     \
               : MMPEFT_ACC_16(0), MMPEFT_ACC_16(16), MMPEFT_ACC_16(32), MMPEFT_ACC_16(48),                           \
                 MMPEFT_ACC_16(64), MMPEFT_ACC_16(80), MMPEFT_ACC_16(96), MMPEFT_ACC_16(112)                          \
               : "l"(a), "l"(b), "n"(static_cast<int>(b_has_contiguous_n)))

// acc [64, 2 * count] += a [64, 16] b [16, 2 * count] of two descriptors, asynchronously: fence, commit and wait
// around it. a has contiguous K; b has contiguous N where b_has_contiguous_n, contiguous K otherwise.
template <typename Element, bool b_has_contiguous_n, int count>
__device__ inline void wgmma(float (&acc)[count], uint64_t a, uint64_t b) {
  static_assert(count == 64 || count == 128, "tiles are 128 or 256 columns wide");
  if constexpr (std::is_same_v<Element, __half>) {
    if constexpr (count == 64) {
      MMPEFT_WGMMA_N128("f16");
    } else {
      MMPEFT_WGMMA_N256("f16");
    }
  } else {
    if constexpr (count == 64) {
      MMPEFT_WGMMA_N128("bf16");
    } else {
      MMPEFT_WGMMA_N256("bf16");
    }
  }
}

#undef MMPEFT_WGMMA_N128
#undef MMPEFT_WGMMA_N256
#undef MMPEFT_ACC_16
#undef MMPEFT_ACC_4

}  // namespace mmpeft::cuda
