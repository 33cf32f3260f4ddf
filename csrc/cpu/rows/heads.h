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

// buffer = x l rounded, and 1 / rms of it where there is a gain.
template <typename T>
MMPEFT_INLINE float scaled_head(const T* x, const float* scale, int64_t n, bool normalise, float eps, float* buffer) {
  F32 squares{};
  for_columns(0, n, [&](int64_t d, auto part) {
    F32 v = load(x + d, part);
    if (scale) v = rounded<T>(v * load(scale + d, part));
    squares += v * v;
    store(buffer + d, v, part);
  });
  return normalise ? 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps) : 0.0f;
}

template <typename T>
void heads(const HeadsArgs& given, int64_t begin, int64_t end, float* scratch) {
  const HeadsArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, half = n / 2;
  float *cos_buffer = scratch, *sin_buffer = scratch + n, *head_buffer = scratch + 2 * n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* x = head_of<T>(args.x, b, head, t);
      T* out = head_of<T>(args.out, b, head, t);
      const float* scale = args.scale ? args.scale + head * n : nullptr;
      float rstd = 0.0f;
      if (args.gain) rstd = scaled_head(x, scale, n, true, args.eps, head_buffer);
      // Columns d of the head after scale and norm.
      auto transformed = [&](int64_t d, auto part) MMPEFT_LAMBDA {
        if (args.gain) return rounded<T>(rounded<T>(load(head_buffer + d, part) * rstd) * load(args.gain + d, part));
        F32 v = load(x + d, part);
        return scale ? rounded<T>(v * load(scale + d, part)) : v;
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
  float *cos_buffer = scratch, *sin_buffer = scratch + n, *head_buffer = scratch + 2 * n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* dy = head_of<T>(args.dy, b, head, t);
      const T* x = args.x.data ? head_of<T>(args.x, b, head, t) : nullptr;
      T* dx = args.dx.data ? head_of<T>(args.dx, b, head, t) : nullptr;
      const float* scale = args.scale ? args.scale + head * n : nullptr;
      float* dscale_head = dscale ? dscale + head * n : nullptr;
      // What is left once the gradient has passed the rotation and the norm: dl and the scale itself.
      auto finish = [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
        v = rounded<T>(v);
        if (dscale_head) add_to(dscale_head + d, v * load(x + d, part), part);
        if (scale) v = v * load(scale + d, part);
        if (dx) store(dx + d, v, part);
      };
      float rstd = 0.0f;
      if (args.gain) rstd = scaled_head(x, scale, n, true, args.eps, head_buffer);
      F32 projection{};
      auto before_norm = [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
        if (!args.gain) return finish(d, v, part);
        v = rounded<T>(v);
        const F32 normalised = load(head_buffer + d, part) * rstd;
        if (dgain) add_to(dgain + d, v * normalised, part);
        projection += v * load(args.gain + d, part) * normalised;
      };
      // Both halves of the gradient below the rotation; the norm needs them twice and they cost little.
      auto unrotated = [&](auto consume) MMPEFT_LAMBDA {
        if (cos) {
          for_columns(0, half, [&](int64_t d, auto part) {
            const F32 dy1 = load(dy + d, part), dy2 = load(dy + half + d, part);
            const F32 v1 = dy1 * load(cos + d, part) + dy2 * load(sin + half + d, part);
            const F32 v2 = dy2 * load(cos + half + d, part) - dy1 * load(sin + d, part);
            consume(d, v1, part);
            consume(d + half, v2, part);
          });
        } else {
          for_columns(0, n, [&](int64_t d, auto part) { consume(d, load(dy + d, part), part); });
        }
      };
      unrotated(before_norm);
      if (args.gain && (dx || dscale_head)) {
        const float mean = sum_of(projection) / static_cast<float>(n);
        unrotated([&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
          const F32 normalised = load(head_buffer + d, part) * rstd;
          finish(d, (rounded<T>(v) * load(args.gain + d, part) - normalised * mean) * rstd, part);
        });
      }
    }
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
