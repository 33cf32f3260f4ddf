// Stands in for csrc/cuda/hopper.cuh: the same functions, by the PTX ISA's words on mbarrier, TMA and wgmma.
#pragma once

#include <cuda.h>

#include <cstdio>
#include <map>

#include "warp_mma.cuh"

namespace mmpeft::cuda {

constexpr int kWarpgroup = 128;

struct Barrier {
  int count = 0, arrivals_left = 0;
  int64_t bytes_left = 0;
  uint32_t phase = 0;

  void settle() {
    if (arrivals_left != 0 || bytes_left != 0) return;
    arrivals_left = count;
    phase ^= 1;
  }
};
inline std::map<uint32_t, Barrier> barriers;

inline void mbarrier_init(uint32_t barrier, int count) { barriers[barrier] = {count, count, 0, 0}; }
inline void mbarrier_init_fence() {}

inline void mbarrier_arrive_and_expect(uint32_t barrier, int bytes) {
  Barrier& state = barriers.at(barrier);
  if (state.arrivals_left == 0) std::abort();
  state.bytes_left += bytes;
  --state.arrivals_left;
  state.settle();
}

inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_and_expect(barrier, 0); }

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::wait_until("an mbarrier", [=] { return barriers.at(barrier).phase != parity; });
}

// What the emulated encoder writes into a CUtensorMap.
struct TensorMap {
  char* data;
  int64_t inner_size, outer_size, stride_bytes;
  int box_inner, box_outer;
};

constexpr int kLoads = 0;
inline int stores_of_thread() { return 1 + static_cast<int>(threadIdx.x); }

// Address bits 4 to 6 are xored with bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }
inline uint16_t& shared_element(uint32_t address) {
  return *reinterpret_cast<uint16_t*>(emulated::shared_memory() + (address - emulated::kSharedBase));
}

template <typename Move>
inline void for_each_element(const TensorMap& map, uint32_t shared, int inner, int outer, Move move) {
  if (shared % 1024 != 0) std::fprintf(stderr, "a box at shared address %u\n", shared), std::abort();
  for (int row = 0; row < map.box_outer; ++row) {
    for (int col = 0; col < map.box_inner; ++col) {
      const int64_t i = inner + col, j = outer + row;
      const bool inside = i >= 0 && j >= 0 && i < map.inner_size && j < map.outer_size;
      auto* element = inside ? reinterpret_cast<uint16_t*>(map.data + j * map.stride_bytes) + i : nullptr;
      move(element, shared_element(swizzle(shared + row * map.box_inner * 2 + col * 2)));
    }
  }
}

inline void tma_load(uint32_t shared, const CUtensorMap* encoded, int inner, int outer, uint32_t barrier) {
  const TensorMap map = *reinterpret_cast<const TensorMap*>(encoded);
  emulated::later(kLoads, [=] {
    for_each_element(map, shared, inner, outer, [](uint16_t* global, uint16_t& local) {
      local = global ? *global : 0;
    });
    Barrier& state = barriers.at(barrier);
    state.bytes_left -= map.box_inner * map.box_outer * 2;
    state.settle();
  });
}

inline void tma_store(const CUtensorMap* encoded, uint32_t shared, int inner, int outer) {
  const TensorMap map = *reinterpret_cast<const TensorMap*>(encoded);
  emulated::later(stores_of_thread(), [=] {
    for_each_element(map, shared, inner, outer, [](uint16_t* global, uint16_t& local) {
      if (global) *global = local;
    });
  });
}

inline void tma_store_commit() {}
inline void tma_store_wait_read() { emulated::flush(stores_of_thread()); }
inline void async_proxy_fence() {}

template <int registers>
inline void give_registers_up() {}
template <int registers>
inline void take_registers() {}

inline void warpgroup_sync(int barrier) { emulated::barrier(barrier, kWarpgroup); }

// Each warp issues and waits for its own quarter of a product: 16 rows of 64.
struct WarpProduct {
  uint64_t a, b;
  float* acc[32];
  void (*run)(const WarpProduct&, int warp);
};
struct WarpProducts {
  std::vector<WarpProduct> open;
  std::vector<std::vector<WarpProduct>> groups;
};
inline WarpProducts warp_products[32];

inline void wgmma_fence() {
  emulated::meet(32, nullptr, [](void**) {});
}

inline void wgmma_commit() {
  emulated::meet(32, nullptr, [](void**) {
    WarpProducts& products = warp_products[threadIdx.x / 32];
    products.groups.push_back(std::move(products.open));
    products.open.clear();
  });
}

// A product reads its operands as late as it may: when it is waited for.
template <int pending>
inline void wgmma_wait() {
  emulated::meet(32, nullptr, [](void**) {
    WarpProducts& products = warp_products[threadIdx.x / 32];
    while (products.groups.size() > pending) {
      for (const WarpProduct& product : products.groups.front()) product.run(product, threadIdx.x / 32 % 4);
      products.groups.erase(products.groups.begin());
    }
  });
}

template <int count>
inline void pin_registers(float (&)[count]) {}

// Address of element (mn, k) of an operand in the canonical layout of the 128-byte swizzle mode (PTX ISA, "Strides").
inline uint32_t operand_address(uint64_t descriptor, bool contiguous_k, int mn, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) std::abort();
  const uint32_t offset = contiguous_k ? mn / 8 * stride + mn % 8 * 128 + k * 2
                                       : mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  return swizzle(start + offset);
}

template <typename Element, bool b_has_contiguous_n, int count>
inline void wgmma(float (&acc)[count], uint64_t a, uint64_t b) {
  struct Lane {
    float* acc;
  } mine = {acc};
  emulated::meet(32, &mine, [a, b](void** all) {
    WarpProduct product = {a, b, {}, [](const WarpProduct& self, int warp) {
      float left[16][16];
      static float right[16][count * 2];
      for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < 16; ++m) {
          left[m][k] = element_of<Element>(shared_element(operand_address(self.a, true, warp * 16 + m, k)));
        }
        for (int n = 0; n < count * 2; ++n) {
          right[k][n] = element_of<Element>(shared_element(operand_address(self.b, !b_has_contiguous_n, n, k)));
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < count; ++i) {
          // PTX ISA, accumulator of wgmma.m64nNk16.
          const int row = lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float sum = self.acc[lane][i];
          for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
          self.acc[lane][i] = sum;
        }
      }
    }};
    for (int lane = 0; lane < 32; ++lane) product.acc[lane] = static_cast<Lane*>(all[lane])->acc;
    warp_products[threadIdx.x / 32].open.push_back(product);
  });
}

}  // namespace mmpeft::cuda
