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

template <typename Args>
MMPEFT_INLINE const float* scale_of(const Args& args, int64_t head) {
  return args.scale ? args.scale + head * args.head_dim : nullptr;
}

// kLanes heads at a time have the lanes of a vector in what is one number for a head: one after the other, each would
// wait for its own sum, root and quotient.
MMPEFT_INLINE F32 inverse_rms_of_heads(F32 (&squares)[kLanes], int64_t n, float eps) {
  return 1.0f / square_root(sums_of(squares) / static_cast<float>(n) + eps);
}

template <typename T>
MMPEFT_INLINE F32 squares_of_head(const T* x, const float* scale, int64_t n) {
  F32 squares{};
  for_columns(0, n, [&](int64_t d, auto part) MMPEFT_LAMBDA {
    const F32 v = scaled(x, scale, d, part);
    squares += v * v;
  });
  return squares;
}

template <typename T>
void heads(const HeadsArgs& given, int64_t begin, int64_t end, float* scratch) {
  const HeadsArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, half = n / 2;
  float *cos_buffer = scratch, *sin_buffer = scratch + n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
    F32 rstds{};
    for (int64_t head = 0; head < args.heads; ++head) {
      const int lane = static_cast<int>(head % kLanes);
      if (args.gain && lane == 0) {
        F32 squares[kLanes] = {};
        for (int i = 0; i < kLanes && head + i < args.heads; ++i)
          squares[i] = squares_of_head(head_of<T>(args.x, b, head + i, t), scale_of(args, head + i), n);
        rstds = inverse_rms_of_heads(squares, n, args.eps);
      }
      const T* x = head_of<T>(args.x, b, head, t);
      T* out = head_of<T>(args.out, b, head, t);
      const float* scale = scale_of(args, head);
      const float rstd = rstds[lane];
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

template <bool kScale, bool kGain, typename T>
void heads_backward_rows(const HeadsBackwardArgs args, int64_t begin, int64_t end, float* scratch, float* dscale,
                         float* dgain) {
  const int64_t n = args.head_dim, half = n / 2;
  float *cos_buffer = scratch, *sin_buffer = scratch + n;
  float* below_rotation = scratch + 2 * n;  // dy after the rotation's transpose, [kLanes, n]
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.length, t = row % args.length;
    // The next token's sums would wait for memory, which is idle while this one's second sweep runs.
    const bool has_next = row + 1 < end && t + 1 < args.length;
    const int64_t next_x = has_next ? args.x.token : 0, next_dy = has_next ? args.dy.token : 0;
    const float *cos = nullptr, *sin = nullptr;
    if (args.cos.data) {
      cos = angles(args.cos, args.angle_dtype, b, t, n, cos_buffer);
      sin = angles(args.sin, args.angle_dtype, b, t, n, sin_buffer);
    }
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
    // What is left of the way down, for the gradient v of the head's scaled columns d.
    auto finish = [&](int64_t head, int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
      if constexpr (kScale) v = rounded<T>(v);
      if (dscale) add_to(dscale + head * n + d, v * load(head_of<T>(args.x, b, head, t) + d, part), part);
      if constexpr (kScale) v = v * load(args.scale + head * n + d, part);
      if (args.dx.data) store(head_of<T>(args.dx, b, head, t) + d, v, part);
    };
    if constexpr (!kGain) {
      for (int64_t head = 0; head < args.heads; ++head)
        unrotated(head, [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA { finish(head, d, v, part); });
      continue;
    }
    for (int64_t first = 0; first < args.heads; first += kLanes) {
      const int count = args.heads - first < kLanes ? static_cast<int>(args.heads - first) : kLanes;
      F32 squares[kLanes] = {}, projections[kLanes] = {};
      for (int i = 0; i < count; ++i) {
        const T* x = head_of<T>(args.x, b, first + i, t);
        const float* scale = kScale ? scale_of(args, first + i) : nullptr;
        F32 square{}, projection{};
        unrotated(first + i, [&](int64_t d, F32 v, auto part) MMPEFT_LAMBDA {
          const F32 at = scaled(x, scale, d, part);
          square += at * at;
          projection += v * load(args.gain + d, part) * at;
          store(below_rotation + i * n + d, v, part);
        });
        squares[i] = square;
        projections[i] = projection;
      }
      const F32 rstds = inverse_rms_of_heads(squares, n, args.eps);
      const F32 means = sums_of(projections) * rstds / static_cast<float>(n);
      float rstd[kLanes], slope[kLanes];
      store(rstd, rstds, Whole{});
      store(slope, means * rstds * rstds, Whole{});
      for (int i = 0; i < count; ++i) {
        const T* x = head_of<T>(args.x, b, first + i, t);
        const float* scale = kScale ? scale_of(args, first + i) : nullptr;
        const T* dy = head_of<T>(args.dy, b, first + i, t);
        for_columns(0, n, [&](int64_t d, auto part) MMPEFT_LAMBDA {
          prefetch(x + next_x + d);
          prefetch(dy + next_dy + d);
          const F32 at = scaled(x, scale, d, part);
          const F32 v = load(below_rotation + i * n + d, part) * rstd[i];
          if (dgain) add_to(dgain + d, v * at, part);
          finish(first + i, d, v * load(args.gain + d, part) - at * slope[i], part);
        });
      }
    }
  }
}

template <typename T>
void heads_backward(const HeadsBackwardArgs& args, int64_t begin, int64_t end, float* scratch, float* dscale,
                    float* dgain) {
  const auto rows = args.gain ? args.scale ? heads_backward_rows<true, true, T> : heads_backward_rows<false, true, T>
                    : args.scale ? heads_backward_rows<true, false, T>
                                 : heads_backward_rows<false, false, T>;
  rows(args, begin, end, scratch, dscale, dgain);
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
