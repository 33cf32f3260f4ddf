// The prefix part of attention, merged with a main part that any flash kernel computed.
//
//   L = logaddexp(L_main, logsumexp_p s_p),  s_p = scale q k_p,  o = o_main exp(L_main - L) + sum_p exp(s_p - L) v_p
//   w = exp(s - L),  ds = scale w (do v_p - sum(do o)),  dq += ds k_p,  dk_p = sum ds q,  dv_p = sum w do
#pragma once

#include "csrc/cpu/rows/heads.h"

namespace mmpeft {
namespace MMPEFT_ISA {

// products[p] = factor sum_d x[d] table[d, p] for a table [DH, padded].
MMPEFT_INLINE void row_products(const float* x, const float* table, int64_t head_dim, int64_t padded, float factor,
                                float* products) {
  int64_t p = 0;
  for (; p + 2 * kLanes <= padded; p += 2 * kLanes) {
    F32 sums[4] = {};
    int64_t d = 0;
    for (; d + 2 <= head_dim; d += 2)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] += x[d + i / 2] * load(table + (d + i / 2) * padded + p + (i % 2) * kLanes, Whole{});
    for (; d < head_dim; ++d)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) sums[i] += x[d] * load(table + d * padded + p + i * kLanes, Whole{});
    store(products + p, (sums[0] + sums[2]) * factor, Whole{});
    store(products + p + kLanes, (sums[1] + sums[3]) * factor, Whole{});
  }
  for (; p < padded; p += kLanes) {
    F32 sums[4] = {};
    int64_t d = 0;
    for (; d + 4 <= head_dim; d += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] += x[d + i] * load(table + (d + i) * padded + p, Whole{});
    for (; d < head_dim; ++d) sums[0] += x[d] * load(table + d * padded + p, Whole{});
    store(products + p, ((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor, Whole{});
  }
}

// v + sum_p weights[p] table[p, d] for columns d of a table [P, DH].
template <typename Part>
MMPEFT_INLINE F32 plus_weighted_rows(F32 v, const float* weights, const float* table, int64_t num_prefix,
                                     int64_t head_dim, int64_t d, Part part) {
  F32 sums[2] = {v, F32{}};
  int64_t p = 0;
  for (; p + 2 <= num_prefix; p += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sums[i] += weights[p + i] * load(table + (p + i) * head_dim + d, part);
  if (p < num_prefix) sums[0] += weights[p] * load(table + p * head_dim + d, part);
  return sums[0] + sums[1];
}

template <typename T>
MMPEFT_INLINE void widen_row(const T* from, int64_t n, float* to) {
  for_columns(0, n, [&](int64_t d, auto part) { store(to + d, load(from + d, part), part); });
}

template <typename T>
void merge_prefix(const MergePrefixArgs& given, int64_t begin, int64_t end, float* scratch) {
  const MergePrefixArgs args = given;  // a copy that no store can change
  const PrefixTables& prefix = args.prefix;
  const int64_t n = args.head_dim, num_prefix = prefix.num_prefix;
  const float infinity = __builtin_inff();
  float *weights = scratch, *q_buffer = scratch + prefix.padded;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = row % args.length, head = row / args.length % args.heads, b = row / args.length / args.heads;
    const int64_t table = head / args.group_size * num_prefix * n;
    const int64_t transposed = head / args.group_size * n * prefix.padded;
    widen_row(head_of<T>(args.q, b, head, t), n, q_buffer);
    row_products(q_buffer, prefix.k_transposed + transposed, n, prefix.padded, args.scale, weights);

    float* lse_at = args.lse + b * args.lse_batch + head * args.lse_head + t * args.lse_token;
    // Kernels report an arbitrary lse, and may report nan, for queries that attend to nothing: they count as none.
    const bool alive = !args.alive || args.alive[b * args.alive_batch + head * args.alive_head + t * args.alive_token];
    const float lse_main = alive ? *lse_at : -infinity;
    float highest = lse_main;
    for (int64_t p = 0; p < num_prefix; ++p) highest = weights[p] > highest ? weights[p] : highest;
    const float shift = highest > -infinity && highest < infinity ? highest : 0.0f;
    float total = std::exp(lse_main - shift);
    for (int64_t p = num_prefix; p < prefix.padded; ++p) weights[p] = -infinity;
    F32 totals{};
    for (int64_t p = 0; p < prefix.padded; p += kLanes) {
      const F32 e = exp(load(weights + p, Whole{}) - shift);
      totals += e;
      store(weights + p, e, Whole{});
    }
    total += sum_of(totals);
    const float inverse = 1.0f / total, main_weight = std::exp(lse_main - shift) * inverse;
    for (int64_t p = 0; p < prefix.padded; p += kLanes)
      store(weights + p, load(weights + p, Whole{}) * inverse, Whole{});
    *lse_at = shift + std::log(total);

    T* out = head_of<T>(args.out, b, head, t);
    for_columns(0, n, [&](int64_t d, auto part) {
      const F32 main = alive ? load(out + d, part) * main_weight : F32{};
      store(out + d, plus_weighted_rows(main, weights, prefix.v + table, num_prefix, n, d, part), part);
    });
  }
}

// Rows whose shares of dk and dv are added to the sums together: their q and dout stay in registers.
constexpr int kRowsTogether = 8;

// sums[p, d] += sum_i weights[i, p] rows[i, d] of kRowsTogether rows.
MMPEFT_INLINE void add_outer_products(const float* weights, int64_t padded, const float* rows, int64_t head_dim,
                                      int64_t num_prefix, float* sums) {
  for_columns(0, head_dim, [&](int64_t d, auto part) {
    F32 row[kRowsTogether];
    for (int i = 0; i < kRowsTogether; ++i) row[i] = load(rows + i * head_dim + d, part);
    for (int64_t p = 0; p < num_prefix; ++p) {
      F32 even = load(sums + p * head_dim + d, part), odd{};
#pragma GCC unroll 4
      for (int i = 0; i < kRowsTogether; i += 2) {
        even += weights[i * padded + p] * row[i];
        odd += weights[(i + 1) * padded + p] * row[i + 1];
      }
      store(sums + p * head_dim + d, even + odd, part);
    }
  });
}

template <typename T>
void prefix_backward(const PrefixBackwardArgs& given, int64_t kv_head, int64_t begin, int64_t end, float* scratch,
                     float* dk, float* dv) {
  const PrefixBackwardArgs args = given;  // a copy that no store can change
  const PrefixTables& prefix = args.prefix;
  const int64_t n = args.head_dim, num_prefix = prefix.num_prefix, padded = prefix.padded;
  const int64_t table = kv_head * num_prefix * n, transposed = kv_head * n * padded;
  float *weights = scratch, *dscores = weights + kRowsTogether * padded;
  float *q_rows = dscores + kRowsTogether * padded, *dout_rows = q_rows + kRowsTogether * n;
  for (int64_t first = begin; first < end; first += kRowsTogether) {
    const int64_t count = end - first < kRowsTogether ? end - first : kRowsTogether;
    if (count < kRowsTogether) memset(scratch, 0, sizeof(float) * kRowsTogether * 2 * (padded + n));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i, t = row % args.length, group = row / args.length % args.group_size;
      const int64_t b = row / args.length / args.group_size, head = kv_head * args.group_size + group;
      float *w = weights + i * padded, *ds = dscores + i * padded, *q = q_rows + i * n, *g = dout_rows + i * n;
      widen_row(head_of<T>(args.q, b, head, t), n, q);
      const T *dout = head_of<T>(args.dout, b, head, t), *out = head_of<T>(args.out, b, head, t);
      F32 deltas{};
      for_columns(0, n, [&](int64_t d, auto part) {
        const F32 v = load(dout + d, part);
        store(g + d, v, part);
        deltas += v * load(out + d, part);
      });
      const float delta = sum_of(deltas);
      row_products(q, prefix.k_transposed + transposed, n, padded, args.scale, w);
      row_products(g, prefix.v_transposed + transposed, n, padded, 1.0f, ds);
      const float lse = args.lse[b * args.lse_batch + head * args.lse_head + t * args.lse_token];
      for (int64_t p = 0; p < padded; p += kLanes) {
        const F32 weight = exp(load(w + p, Whole{}) - lse);
        store(w + p, weight, Whole{});
        store(ds + p, weight * (load(ds + p, Whole{}) - delta) * args.scale, Whole{});
      }
      T* dq = head_of<T>(args.dq, b, head, t);
      for_columns(0, n, [&](int64_t d, auto part) {
        store(dq + d, plus_weighted_rows(load(dq + d, part), ds, prefix.k + table, num_prefix, n, d, part), part);
      });
    }
    add_outer_products(dscores, padded, q_rows, n, num_prefix, dk);
    add_outer_products(weights, padded, dout_rows, n, num_prefix, dv);
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
