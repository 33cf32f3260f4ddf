// Dropout bits as an array of their own, and the activations of rank-sized matrices: z = f(a), da = dz f'(a).
#pragma once

#include "csrc/cpu/rows/elementary.h"
#include "csrc/cpu/rows/philox.h"

namespace mmpeft {
namespace MMPEFT_ISA {

template <typename Bits>
void keep_bits_rows(const KeepBitsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Bits* to = static_cast<Bits*>(args.keep.data) + row * args.keep.stride;
    for_dropout_blocks(args.dropout, row, args.width, [&](int64_t first, int64_t last, const int16_t* keep) {
      for (int64_t k = first; k < last; ++k) to[k] = keep[k - first];
    });
  }
}

inline void keep_bits(const KeepBitsArgs& args, int64_t begin, int64_t end) {
  switch (args.itemsize) {
    case 2: return keep_bits_rows<int16_t>(args, begin, end);
    case 4: return keep_bits_rows<int32_t>(args, begin, end);
    case 8: return keep_bits_rows<int64_t>(args, begin, end);
  }
}

template <Activation kName, typename T>
MMPEFT_INLINE F32 activate(F32 a) {
  if constexpr (kName == Activation::kTanh) return tanh<T>(a);
  // Written so that a nan stays one.
  if constexpr (kName == Activation::kRelu) return select(a < 0.0f, F32{}, a);
  if constexpr (kName == Activation::kGelu) return a * normal<T>(a).cumulative;
  if constexpr (kName == Activation::kSilu) return a * sigmoid<T>(a);
  return a;
}

template <Activation kName, typename T>
MMPEFT_INLINE F32 derivative(F32 a) {
  if constexpr (kName == Activation::kTanh) {
    const F32 z = tanh<T>(a);
    return 1.0f - z * z;
  }
  if constexpr (kName == Activation::kRelu) return select(a > 0.0f, splat(1.0f), F32{});
  if constexpr (kName == Activation::kGelu) {
    const Normal at = normal<T>(a);
    return at.cumulative + a * at.exponential * 0.39894228f;
  }
  if constexpr (kName == Activation::kSilu) return silu_derivative(a, sigmoid<T>(a));
  return splat(1.0f);
}

template <Activation kName, typename T>
void activation_rows(const ActivationArgs args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = row_of<T>(args.a, row);
    const T* dz = args.dz.data ? row_of<T>(args.dz, row) : nullptr;
    T* out = row_to_write<T>(args.out, row);
    for_columns(0, args.width, [&](int64_t k, auto part) {
      const F32 v = load(a + k, part);
      store(out + k, dz ? load(dz + k, part) * derivative<kName, T>(v) : activate<kName, T>(v), part);
    });
  }
}

template <typename T>
void activation(const ActivationArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kIdentity: return activation_rows<Activation::kIdentity, T>(args, begin, end);
    case Activation::kTanh: return activation_rows<Activation::kTanh, T>(args, begin, end);
    case Activation::kRelu: return activation_rows<Activation::kRelu, T>(args, begin, end);
    case Activation::kGelu: return activation_rows<Activation::kGelu, T>(args, begin, end);
    case Activation::kSilu: return activation_rows<Activation::kSilu, T>(args, begin, end);
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
