// What happens to q, k and v between their GEMM and the softmax: y = rotate(norm(x l)), head by head, and back.
//
//   norm(x) = gain x rstd, rstd over a head       rotate(x) = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2], halves of a head
//   dx = norm^T(rotate^T(dy)) l, dl = sum over tokens of norm^T(rotate^T(dy)) x, dgain = sum rotate^T(dy) x l rstd
#pragma once

#include "csrc/cpu/rows/prologue_backward.h"

namespace mmpeft {
namespace MMPEFT_ISA {

template <typename T, typename H>
MMPEFT_INLINE auto head_of(const H& array, int64_t b, int64_t head, int64_t t) {
  using Pointer = decltype(array.data);
  if constexpr (__is_same(Pointer, void*))
    return static_cast<T*>(array.data) + b * array.batch + head * array.head + t * array.token;
  else
    return static_cast<const T*>(array.data) + b * array.batch + head * array.head + t * array.token;
}

// The cosines or sines of a token as floats: cast into `buffer` where they are not floats already.
MMPEFT_INLINE const float* angles(const ConstHeads& array, Dtype dtype, int64_t b, int64_t t, int64_t n,
                                  float* buffer) {
  if (dtype == kFloat32) return head_of<float>(array, b, 0, t);
  if (dtype == kBFloat16) {
    const BFloat16* from = head_of<BFloat16>(array, b, 0, t);
    for_columns(0, n, [&](int64_t d, auto part) { store(buffer + d, load(from + d, part), part); });
  } else {
    const Float16* from = head_of<Float16>(array, b, 0, t);
    for_columns(0, n, [&](int64_t d, auto part) { store(buffer + d, load(from + d, part), part); });
  }
  return buffer;
}

// Columns d of a head after its scale.
template <typename T, typename Part>
MMPEFT_INLINE F32 scaled(const T* x, const float* scale, int64_t d, Part part) {
  const F32 v = load(x + d, part);
  return scale ? rounded<T>(v * load(scale + d, part)) : v;
}

template <typename T>
MMPEFT_INLINE float inverse_rms_of_head(const T* x, const float* scale, int64_t n, float eps) {
  F32 squares{};
  for_columns(0, n, [&](int64_t d, auto part) MMPEFT_LAMBDA {
    const F32 v = scaled(x, scale, d, part);
    squares += v * v;
  });
  return inverse_rms(squares, n, eps);
}

template <typename T>
void heads(const HeadsArgs& given, int64_t begin, int64_t end, float* scratch) {
  const HeadsArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, half = n / 2;
  float *cos_buffer = scratch, *sin_buffer = scratch + n, *rstds = scratch + 2 * n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
    // All heads' statistics first: one after the other, each would wait for its own sum, root and quotient.
    if (args.gain)
      for (int64_t head = 0; head < args.heads; ++head)
        rstds[head] = inverse_rms_of_head(head_of<T>(args.x, b, head, t),
                                          args.scale ? args.scale + head * n : nullptr, n, args.eps);
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* x = head_of<T>(args.x, b, head, t);
      T* out = head_of<T>(args.out, b, head, t);
      const float* scale = args.scale ? args.scale + head * n : nullptr;
      const float rstd = args.gain ? rstds[head] : 0.0f;
      // Columns d of the head after scale and norm.
      auto transformed = [&](int64_t d, auto part) MMPEFT_LAMBDA {
        const F32 v = scaled(x, scale, d, part);
        return args.gain ? rounded<T>(rounded<T>(v * rstd) * load(args.gain + d, part)) : v;
      };
      if (cos) {
        for_columns(0, half, [&](int64_t d, auto part) {
          const F32 x1 = transformed(d, part), x2 = transformed(d + half, part);
          const F32 y1 = x1 * load(cos + d, part) - x2 * load(sin + d, part);
          const F32 y2 = x2 * load(cos + half + d, part) + x1 * load(sin + half + d, part);
          store(out + d, y1, part);
          store(out + half + d, y2, part);
        });
      } else {
        for_columns(0, n, [&](int64_t d, auto part) { store(out + d, transformed(d, part), part); });
      }
    }
  }
}

template <typename T>
void heads_backward(const HeadsBackwardArgs& given, int64_t begin, int64_t end, float* scratch, float* dscale,
                    float* dgain) {
  const HeadsBackwardArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, half = n / 2;
  float *cos_buffer = scratch, *sin_buffer = scratch + n, *rstds = scratch + 2 * n, *means = rstds + args.heads;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
    auto scale_of = [&](int64_t head) MMPEFT_LAMBDA { return args.scale ? args.scale + head * n : nullptr; };
    // consume(columns d, gradient there below the rotation, part) for a head.
    auto unrotated = [&](int64_t head, auto consume) MMPEFT_LAMBDA {
      const T* dy = head_of<T>(args.dy, b, head, t);
      if (cos) {
        for_columns(0, half, [&](int64_t d, auto part) MMPEFT_LAMBDA {
          const F32 dy1 = load(dy + d, part), dy2 = load(dy + half + d, part);
          const F32 v1 = dy1 * load(cos + d, part) + dy2 * load(sin + half + d, part);
          const F32 v2 = dy2 * load(cos + half + d, part) - dy1 * load(sin + d, part);
          consume(d, v1, part);
          consume(d + half, v2, part);
        });
      } else {
        for_columns(0, n, [&](int64_t d, auto part) MMPEFT_LAMBDA { consume(d, load(dy + d, part), part); });
      }
    };
    if (args.gain) {
      // All heads' sums first: one after the other, each head would wait for its own.
      for (int64_t head = 0; head < args.heads; ++head) {
        const T* x = head_of<T>(args.x, b, head, t);
        const float* scale = scale_of(head);
        F32 squares{}, projection{};
        unrotated(head, [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
          const F32 at = scaled(x, scale, d, part);
          squares += at * at;
          projection += rounded<T>(v) * load(args.gain + d, part) * at;
        });
        rstds[head] = inverse_rms(squares, n, args.eps);
        means[head] = sum_of(projection) * rstds[head] / static_cast<float>(n);
      }
    }
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* x = args.x.data ? head_of<T>(args.x, b, head, t) : nullptr;
      T* dx = args.dx.data ? head_of<T>(args.dx, b, head, t) : nullptr;
      const float* scale = scale_of(head);
      float* dscale_head = dscale ? dscale + head * n : nullptr;
      const float rstd = args.gain ? rstds[head] : 0.0f, mean = args.gain ? means[head] : 0.0f;
      unrotated(head, [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
        if (args.gain || scale) v = rounded<T>(v);
        if (args.gain) {
          const F32 normalised = scaled(x, scale, d, part) * rstd;
          if (dgain) add_to(dgain + d, v * normalised, part);
          v = (v * load(args.gain + d, part) - normalised * mean) * rstd;
          if (scale) v = rounded<T>(v);
        }
        if (dscale_head) add_to(dscale_head + d, v * load(x + d, part), part);
        if (scale) v = v * load(scale + d, part);
        if (dx) store(dx + d, v, part);
      });
    }
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
