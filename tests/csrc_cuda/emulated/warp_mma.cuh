// Stands in for csrc/cuda/warp_mma.cuh: the same functions, by the fragment layouts of the PTX ISA.
#pragma once

#include <cstring>
#include <vector>

namespace mmpeft::cuda {

inline uint32_t shared_address(const void* pointer) {
  return emulated::kSharedBase + static_cast<uint32_t>(static_cast<const char*>(pointer) - emulated::shared_memory());
}

// A copy happens at the latest when its thread waits for its group, and may happen at any time before.
struct AsyncCopies {
  std::vector<std::pair<void*, const void*>> open;
  std::vector<std::vector<std::pair<void*, const void*>>> groups;
};
inline AsyncCopies async_copies[1024];

inline void cp_async_16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) std::abort();
  async_copies[threadIdx.x].open.push_back({shared, global});
}

inline void cp_async_commit() {
  AsyncCopies& copies = async_copies[threadIdx.x];
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int pending>
inline void cp_async_wait() {
  AsyncCopies& copies = async_copies[threadIdx.x];
  while (copies.groups.size() > pending) {
    for (const auto& [shared, global] : copies.groups.front()) std::memcpy(shared, global, 16);
    copies.groups.erase(copies.groups.begin());
  }
}

template <int matrices, bool transposed>
inline void ldmatrix(uint32_t (&fragment)[matrices], const void* row_of_lane) {
  struct Lane {
    uint16_t (*fragment)[2];
    const void* row;
  } mine = {reinterpret_cast<uint16_t(*)[2]>(fragment), row_of_lane};
  emulated::meet(32, &mine, [](void** all) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) {
          const int row = transposed ? lane % 4 * 2 + i : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + i;
          const auto* source = static_cast<const uint16_t*>(static_cast<Lane*>(all[matrix * 8 + row])->row);
          if (reinterpret_cast<uintptr_t>(source) % 16 != 0) std::abort();
          static_cast<Lane*>(all[lane])->fragment[matrix][i] = source[col];
        }
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) { ldmatrix<4, false>(fragment, row); }
inline void ldmatrix_x4_transposed(uint32_t (&fragment)[4], const void* row) { ldmatrix<4, true>(fragment, row); }
inline void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) { ldmatrix<2, false>(fragment, row); }
inline void ldmatrix_x2_transposed(uint32_t (&fragment)[2], const void* row) { ldmatrix<2, true>(fragment, row); }

template <typename Element>
inline float element_of(uint16_t bits) {
  Element element;
  std::memcpy(static_cast<void*>(&element), &bits, 2);
  return static_cast<float>(element);
}

template <typename Element>
inline void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* acc;
    const uint16_t *a, *b;
  } mine = {acc, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b)};
  emulated::meet(32, &mine, [](void** all) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<Lane*>(all[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      // PTX ISA, mma.m16n8k16: rows of a are group for i in {0,1,4,5}, else group + 8; columns are + 8 for i >= 4.
      for (int i = 0; i < 8; ++i) {
        left[group + (i / 2 % 2) * 8][pair + i % 2 + i / 4 * 8] = element_of<Element>(from.a[i]);
      }
      for (int i = 0; i < 4; ++i) right[pair + i % 2 + i / 2 * 8][group] = element_of<Element>(from.b[i]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        float& sum = static_cast<Lane*>(all[lane])->acc[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
      }
    }
  });
}

}  // namespace mmpeft::cuda
