// A CUDA block on one CPU thread: what the kernels need of the language, for g++. Threads are fibers that run until
// they have to wait; blocks run one after the other. Asynchronous work is done late and in random order, so that a
// missing wait shows as a wrong number. Included before every source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <functional>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulated {

struct Position {
  uint3 thread, block;
  dim3 grid;
};
extern Position position;  // of the fiber that runs

// Lets the other fibers run until `ready`; aborts with the reason when nothing can ever become ready.
void wait_until(const char* what, const std::function<bool()>& ready);

// All of `size` neighbouring threads meet; the last one runs `work` on what each handed in, by its index among them.
void meet(int size, void* mine, const std::function<void(void**)>& work);

// A named barrier of `count` threads; 0 is __syncthreads, of the whole block.
void barrier(int id, int count);

// Runs the body as every thread of every block. Shared memory is filled with NaN first.
void run_grid(dim3 grid, int num_threads, int shared_bytes, const std::function<void()>& body);

char* shared_memory();  // of the block; the address of its first byte is kSharedBase
constexpr uint32_t kSharedBase = 1024 + 16;
constexpr int kSharedLimit = 227 * 1024;

// Runs `work` at some later time, at the latest when `flush` is called or nothing else can run.
void later(int queue, std::function<void()> work);
void flush(int queue);

}  // namespace emulated

#define threadIdx (::emulated::position.thread)
#define blockIdx (::emulated::position.block)
#define gridDim (::emulated::position.grid)

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline void __syncthreads() { emulated::barrier(0, 0); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  struct Exchange {
    float value, result;
  } exchange = {value, 0.0f};
  emulated::meet(32, &exchange, [lane_mask](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      static_cast<Exchange*>(all[lane])->result = static_cast<Exchange*>(all[lane ^ lane_mask])->value;
    }
  });
  return exchange.result;
}
