// Cross-entropy of rows of logits, which are replaced by their gradient.
//
//   loss = (logsumexp(logits) - logits[label]) / count,  dlogits = (softmax(logits) - onehot) / count
#pragma once

#include "csrc/cpu/rows/elementary.h"
#include "csrc/cpu/kernels.h"

namespace mmpeft {
namespace MMPEFT_ISA {

constexpr int64_t kIgnoreIndex = -100;
// Logits that are read twice, for their maximum and for the sum, while they are in the first-level cache.
constexpr int64_t kLogitsBlock = 2048;

// The log-sum-exp of a row: a running maximum and the sum relative to it, block by block. Of 16-bit logits it is right
// to 4e-6, far less than their own rounding.
template <typename T>
float logsumexp(const T* logits, int64_t num_words) {
  const float infinity = __builtin_inff();
  float highest = -infinity, total = 0.0f;
  for (int64_t v = 0; v < num_words; v += kLogitsBlock) {
    const int64_t end = v + kLogitsBlock < num_words ? v + kLogitsBlock : num_words;
    F32 tops[2] = {splat(highest), splat(highest)};
    int64_t k = v;
    for (; k + 2 * kLanes <= end; k += 2 * kLanes)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const F32 x = load(logits + k + i * kLanes, Whole{});
        tops[i] = highest_of(x, tops[i]);
      }
    float lanes[kLanes];
    const F32 top = select(tops[0] > tops[1], tops[0], tops[1]);
    memcpy(lanes, &top, sizeof top);
    float higher = highest;
    for (int i = 0; i < kLanes; ++i) higher = lanes[i] > higher ? lanes[i] : higher;
    const int64_t whole_end = k;
    for_columns(k, end, [&](int64_t col, auto part) {
      const F32 x = load(logits + col, part);
      memcpy(lanes, &x, sizeof x);
      const int n = col + kLanes <= end ? kLanes : static_cast<int>(end - col);
      for (int i = 0; i < n; ++i) higher = lanes[i] > higher ? lanes[i] : higher;
    });
    // Nothing but -inf so far, or +inf: a difference to it would be nan where it should be 0 or infinity.
    const float shift = higher > -infinity && higher < infinity ? higher : 0.0f;
    F32 sums[2] = {};
    for (k = v; k < whole_end; k += 2 * kLanes)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) sums[i] += exp<T>(load(logits + k + i * kLanes, Whole{}) - shift);
    float rest = 0.0f;
    for_columns(whole_end, end, [&](int64_t col, auto part) {
      const F32 e = exp<T>(load(logits + col, part) - shift);
      memcpy(lanes, &e, sizeof e);
      const int n = col + kLanes <= end ? kLanes : static_cast<int>(end - col);
      for (int i = 0; i < n; ++i) rest += lanes[i];
    });
    total = total * (total > 0.0f ? std::exp(highest - shift) : 1.0f) + sum_of(sums[0] + sums[1]) + rest;
    highest = higher;
  }
  return (highest > -infinity && highest < infinity ? highest : 0.0f) + std::log(total);
}

template <typename T>
void cross_entropy(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* logits = row_to_write<T>(args.logits, row);
    const int64_t label = args.labels[row];
    const bool is_kept = label != kIgnoreIndex;
    const float lse = logsumexp(logits, args.num_words);
    const float target = is_kept ? load(logits + label, First{1})[0] : 0.0f;
    args.losses[row] = is_kept ? lse - target : 0.0f;
    if (!args.need_grad) continue;
    const float weight = is_kept ? 1.0f / args.count : 0.0f;  // a count of 0, with every row ignored, is no nan
    const int64_t next_row = row + 1 < end ? args.logits.stride : 0;
    for_columns(0, args.num_words, [&](int64_t k, auto part) {
      // The next row's maximum and sum would wait for memory, which is idle now.
      prefetch(logits + next_row + k);
      store(logits + k, exp<T>(load(logits + k, part) - lse) * weight, part);
    });
    if (is_kept) {
      const float probability = std::exp(target - lse);
      store(logits + label, splat((probability - 1.0f) * weight), First{1});
    }
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
