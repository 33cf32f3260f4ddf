// The prefix part of attention, merged with a main part that any flash kernel computed.
//
//   L = logaddexp(L_main, logsumexp_p s_p),  s_p = scale q k_p,  o = o_main exp(L_main - L) + sum_p exp(s_p - L) v_p
//   w = exp(s - L),  ds = scale w (do v_p - sum(do o)),  dq += ds k_p,  dk_p = sum ds q,  dv_p = sum w do
//
// kLanes queries at a time, which have the lanes of a vector in everything that is one number for query and token.
#pragma once

#include "csrc/cpu/rows/heads.h"

namespace mmpeft {
namespace MMPEFT_ISA {

// What weights and tables of tokens are made of: words of kValues tokens each.
template <typename T>
struct Packed {
  static constexpr int kValues = 1;
  static MMPEFT_INLINE F32 multiply_add(F32 sum, U32 a, U32 b) { return sum + (F32)a * (F32)b; }
};

#if defined(MMPEFT_NATIVE_BF16)
// Two products at a time, for sums that are rounded to bfloat16 in the end. Scores and what becomes a gradient of the
// prefix are computed from floats.
template <>
struct Packed<BFloat16> {
  static constexpr int kValues = 2;
  static MMPEFT_INLINE F32 multiply_add(F32 sum, U32 a, U32 b) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static MMPEFT_INLINE U32 pair(F32 first, F32 second) {
    return widen_bits(Format<BFloat16>::narrow(first)) | (widen_bits(Format<BFloat16>::narrow(second)) << 16);
  }
};
#endif

template <typename T>
MMPEFT_INLINE int64_t num_words(int64_t num_prefix) {
  return (num_prefix + Packed<T>::kValues - 1) / Packed<T>::kValues;
}

// columns[d, i] = rows[i][d] for kLanes rows; [num_columns up to whole vectors, kLanes].
template <typename T>
MMPEFT_INLINE void transposed(const T* const* rows, int64_t num_columns, float* columns) {
  for_columns(0, num_columns, [&](int64_t d, auto part) MMPEFT_LAMBDA {
    U32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = (U32)load(rows[i] + d, part);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_raw(columns + (d + i) * kLanes, square[i], Whole{});
  });
}

// The word at an address, which may hold a float, in all lanes.
MMPEFT_INLINE U32 splat_of(const uint32_t* word) {
  uint32_t bits;
  memcpy(&bits, word, sizeof bits);
  return U32{} + bits;
}

// Tokens whose products are summed together: sums that hide each other's latency.
constexpr int kTokensTogether = 8;

// consume(p, sum over d of columns[d] table[p, d]) for kCount tokens from p on; a lane for each query.
template <int kCount, typename Consume>
MMPEFT_INLINE void products_of(int count, const float* columns, const float* table, int64_t head_dim, int64_t p,
                               Consume consume) {
  if constexpr (kCount > 1) {
    if (count < kCount) return products_of<kCount - 1>(count, columns, table, head_dim, p, consume);
  }
  F32 sums[kCount] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    const F32 column = load(columns + d * kLanes, Whole{});
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i] += column * table[(p + i) * head_dim + d];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) consume(p + i, sums[i]);
}

// The same for all tokens, in groups of almost equal size: small ones wait for their own sums.
template <typename Consume>
MMPEFT_INLINE void for_products(const float* columns, const float* table, int64_t head_dim, int64_t num_prefix,
                                Consume consume) {
  const int64_t groups = (num_prefix + kTokensTogether - 1) / kTokensTogether;
  for (int64_t i = 0, p = 0; i < groups; ++i) {
    const int64_t end = num_prefix * (i + 1) / groups;
    products_of<kTokensTogether>(static_cast<int>(end - p), columns, table, head_dim, p, consume);
    p = end;
  }
}

// values [P, kLanes] with neighbouring tokens in a word, [words of P, kLanes]; `words` is room for them.
template <typename T>
MMPEFT_INLINE const uint32_t* token_words(const float* values, int64_t num_prefix, uint32_t* words) {
  if constexpr (Packed<T>::kValues == 1) return reinterpret_cast<const uint32_t*>(values);
#if defined(MMPEFT_NATIVE_BF16)
  if constexpr (Packed<T>::kValues == 2)
    for (int64_t p = 0; p < num_prefix; p += 2) {
      const F32 first = load(values + p * kLanes, Whole{});
      const F32 second = p + 1 < num_prefix ? load(values + (p + 1) * kLanes, Whole{}) : F32{};
      store_raw(words + p / 2 * kLanes, Packed<T>::pair(first, second), Whole{});
    }
#endif
  return words;
}

// Queries and vectors of columns that share what they load.
constexpr int kQueriesTogether = kLanes == 16 ? 8 : 4, kVectorsTogether = 2;

// rows[i, d] = start(i, d) + sum_p weights[p, i] table[p, d] for queries i of a tile and kVectors vectors from d on.
template <int kVectors, typename T, typename Part, typename Start>
MMPEFT_INLINE void add_weighted_tile(T* const* rows, int i0, const uint32_t* weights, const uint32_t* table,
                                     int64_t num_words_of_tokens, int64_t head_dim, int64_t d, Part part,
                                     Start start) {
  F32 sums[kQueriesTogether][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kQueriesTogether; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = start(i0 + i, d + j * kLanes, part);
  for (int64_t p = 0; p < num_words_of_tokens; ++p) {
    U32 values[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) values[j] = load_raw<U32>(table + p * head_dim + d + j * kLanes, part);
#pragma GCC unroll 8
    for (int i = 0; i < kQueriesTogether; ++i) {
      const U32 weight = splat_of(weights + p * kLanes + i0 + i);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Packed<T>::multiply_add(sums[i][j], weight, values[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueriesTogether; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(rows[i0 + i] + d + j * kLanes, sums[i][j], part);
}

template <typename T, typename Start>
MMPEFT_INLINE void add_weighted(T* const* rows, int count, const uint32_t* weights, const uint32_t* table,
                                int64_t num_prefix, int64_t head_dim, Start start) {
  const int64_t tokens = num_words<T>(num_prefix);
  for (int i0 = 0; i0 < count; i0 += kQueriesTogether) {
    int64_t d = 0;
    for (; d + kVectorsTogether * kLanes <= head_dim; d += kVectorsTogether * kLanes)
      add_weighted_tile<kVectorsTogether>(rows, i0, weights, table, tokens, head_dim, d, Whole{}, start);
    for_columns(d, head_dim, [&](int64_t col, auto part) MMPEFT_LAMBDA {
      add_weighted_tile<1>(rows, i0, weights, table, tokens, head_dim, col, part, start);
    });
  }
}

// sums[p, d] += sum_i weights[p, i] rows[i, d], in float32 because the result is: the rows' columns stay in registers
// for all tokens.
template <typename T>
MMPEFT_INLINE void add_outer_products(const float* weights, const T* const* rows, int64_t head_dim,
                                      int64_t num_prefix, float* sums) {
  for_columns(0, head_dim, [&](int64_t d, auto part) MMPEFT_LAMBDA {
    F32 columns[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) columns[i] = load(rows[i] + d, part);
    for (int64_t p = 0; p < num_prefix; ++p) {
      F32 even = load(sums + p * head_dim + d, part), odd{};
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; i += 2) {
        even += weights[p * kLanes + i] * columns[i];
        odd += weights[p * kLanes + i + 1] * columns[i + 1];
      }
      store(sums + p * head_dim + d, even + odd, part);
    }
  });
}

// Where a query lies.
struct Query {
  int64_t b, head, t;
  template <typename T, typename Array>
  MMPEFT_INLINE T* of(const Array& array) const {
    return static_cast<T*>(array.data) + b * array.batch + head * array.head + t * array.token;
  }
};

// Walks over the queries of one key/value head: kLanes that are worked on and the kLanes after them.
template <typename Args>
class Queries {
 public:
  MMPEFT_INLINE Queries(const Args& args, int64_t kv_head, int64_t begin, int64_t end)
      : args_(args), first_head_(kv_head * args.group_size), end_(end), next_row_(begin) {
    const int64_t group = begin / args.length;
    next_ = {group / args.group_size, first_head_ + group % args.group_size, begin % args.length};
    load_ahead();
  }

  // Moves on to the next ones; their number, 0 after the last.
  MMPEFT_INLINE int advance() {
    num_here_ = num_ahead_;
    memcpy(here_, ahead_, sizeof here_);
    load_ahead();
    return num_here_;
  }

  MMPEFT_INLINE const Query& operator[](int i) const { return here_[i]; }

  // Step `step` of `num_steps`, spread over other work, that asks for these queries' rows of arrays. Rows a token apart
  // lie on pages of their own, where the processor foresees nothing; all at once they would wait for each other.
  template <typename T, typename... Arrays>
  MMPEFT_INLINE void prefetch_here(int64_t step, int64_t num_steps, const Arrays&... arrays) const {
    prefetch_rows<T>(here_, num_here_, step, num_steps, arrays...);
  }
  template <typename T, typename... Arrays>
  MMPEFT_INLINE void prefetch_ahead(int64_t step, int64_t num_steps, const Arrays&... arrays) const {
    prefetch_rows<T>(ahead_, num_ahead_, step, num_steps, arrays...);
  }

 private:
  template <typename T, typename... Arrays>
  MMPEFT_INLINE void prefetch_rows(const Query* queries, int count, int64_t step, int64_t num_steps,
                                   const Arrays&... arrays) const {
    for (int64_t i = step * count / num_steps; i < (step + 1) * count / num_steps; ++i)
      for (int64_t d = 0; d < args_.head_dim; d += 64 / static_cast<int64_t>(sizeof(T)))
        (prefetch(queries[i].template of<const T>(arrays) + d), ...);
  }

  MMPEFT_INLINE void load_ahead() {
    num_ahead_ = end_ - next_row_ < kLanes ? static_cast<int>(end_ - next_row_) : kLanes;
    next_row_ += num_ahead_;
    for (int i = 0; i < num_ahead_; ++i) {
      ahead_[i] = next_;
      if (++next_.t < args_.length) continue;
      next_.t = 0;
      if (++next_.head < first_head_ + args_.group_size) continue;
      next_.head = first_head_;
      ++next_.b;
    }
  }

  const Args& args_;
  int64_t first_head_, end_, next_row_;
  Query next_, here_[kLanes] = {}, ahead_[kLanes] = {};
  int num_here_ = 0, num_ahead_ = 0;
};

// The scratch in pieces that start at whole cache lines.
struct Scratch {
  float* next;
  explicit MMPEFT_INLINE Scratch(float* begin) : next(begin) {}
  template <typename Value = float>
  MMPEFT_INLINE Value* take(int64_t size) {
    float* piece = next;
    next += (size + 15) / 16 * 16;
    return reinterpret_cast<Value*>(piece);
  }
};

template <typename T>
void merge_prefix(const MergePrefixArgs& given, int64_t kv_head, int64_t begin, int64_t end, float* scratch) {
  const MergePrefixArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, num_prefix = args.prefix.num_prefix;
  const float* keys = args.prefix.k + kv_head * num_prefix * n;
  const uint32_t* value_words = args.prefix.v_words + kv_head * num_words<T>(num_prefix) * n;
  const float infinity = __builtin_inff();
  Scratch pieces(scratch);
  // Queries that a last group lacks are zeros, and their results go to a row of their own.
  T *zeros = pieces.take<T>(n), *unused = pieces.take<T>(n);
  float *columns = pieces.take((n + kLanes) * kLanes), *weights = pieces.take(num_prefix * kLanes);
  uint32_t* room = pieces.take<uint32_t>(num_prefix * kLanes);
  Queries queries(args, kv_head, begin, end);
  while (const int count = queries.advance()) {
    const T* q[kLanes];
    T* out[kLanes];
    float* lse_at[kLanes];
    F32 lse_main = splat(-infinity);
    I32 alive{};
    for (int i = 0; i < kLanes; ++i) {
      q[i] = zeros;
      out[i] = unused;
      if (i >= count) continue;
      const Query query = queries[i];
      q[i] = query.of<const T>(args.q);
      out[i] = query.of<T>(args.out);
      lse_at[i] = query.of<float>(args.lse);
      // Kernels report an arbitrary lse, and may report nan, for queries that attend to nothing: they count as none.
      alive[i] = !args.alive.data || *query.of<const bool>(args.alive);
      if (alive[i]) lse_main[i] = *lse_at[i];
    }
    transposed(q, n, columns);
    F32 highest = lse_main;
    for_products(columns, keys, n, num_prefix, [&](int64_t p, F32 product) MMPEFT_LAMBDA {
      queries.template prefetch_here<T>(p, num_prefix, args.out);
      queries.template prefetch_ahead<T>(p, num_prefix, args.q);
      const F32 score = product * args.scale;
      highest = highest_of(score, highest);
      store(weights + p * kLanes, score, Whole{});
    });
    const F32 shift = select((highest > -infinity) & (highest < infinity), highest, F32{});
    const F32 main = exp<float>(lse_main - shift);
    F32 total = main;
    for (int64_t p = 0; p < num_prefix; ++p) {
      const F32 e = exp<T>(load(weights + p * kLanes, Whole{}) - shift);
      total += e;
      store(weights + p * kLanes, e, Whole{});
    }
    const F32 inverse = 1.0f / total, main_weight = main * inverse;
    for (int64_t p = 0; p < num_prefix; ++p)
      store(weights + p * kLanes, load(weights + p * kLanes, Whole{}) * inverse, Whole{});
    for (int i = 0; i < count; ++i) *lse_at[i] = shift[i] + std::log(total[i]);
    add_weighted(out, count, token_words<T>(weights, num_prefix, room), value_words, num_prefix, n,
                 [&](int i, int64_t d, auto part) MMPEFT_LAMBDA {
                   return alive[i] ? load(out[i] + d, part) * main_weight[i] : F32{};
                 });
  }
}

template <typename T>
void prefix_backward(const PrefixBackwardArgs& given, int64_t kv_head, int64_t begin, int64_t end, float* scratch,
                     float* dk, float* dv) {
  const PrefixBackwardArgs args = given;  // a copy that no store can change
  const int64_t n = args.head_dim, num_prefix = args.prefix.num_prefix;
  const float* keys = args.prefix.k + kv_head * num_prefix * n;
  const float* values = args.prefix.v + kv_head * num_prefix * n;
  const uint32_t* key_words = args.prefix.k_words + kv_head * num_words<T>(num_prefix) * n;
  Scratch pieces(scratch);
  T *zeros = pieces.take<T>(n), *unused = pieces.take<T>(n);
  float *q_columns = pieces.take((n + kLanes) * kLanes), *dout_columns = pieces.take((n + kLanes) * kLanes);
  float *weights = pieces.take(num_prefix * kLanes), *dscores = pieces.take(num_prefix * kLanes);
  uint32_t* room = pieces.take<uint32_t>(num_prefix * kLanes);
  Queries queries(args, kv_head, begin, end);
  while (const int count = queries.advance()) {
    const T *q[kLanes], *dout[kLanes];
    T* dq[kLanes];
    // Queries that a last group lacks are zeros of weight 0, and their results go to a row of their own.
    F32 lse = splat(__builtin_inff()), delta{};
    for (int i = 0; i < kLanes; ++i) {
      q[i] = dout[i] = zeros;
      dq[i] = unused;
      if (i >= count) continue;
      const Query query = queries[i];
      q[i] = query.of<const T>(args.q);
      dout[i] = query.of<const T>(args.dout);
      dq[i] = query.of<T>(args.dq);
      lse[i] = *query.of<const float>(args.lse);
      const T* out = query.of<const T>(args.out);
      F32 sums{};
      for_columns(0, n, [&](int64_t d, auto part) MMPEFT_LAMBDA {
        sums += load(dout[i] + d, part) * load(out + d, part);
      });
      delta[i] = sum_of(sums);
    }
    transposed(q, n, q_columns);
    transposed(dout, n, dout_columns);
    for_products(q_columns, keys, n, num_prefix, [&](int64_t p, F32 product) MMPEFT_LAMBDA {
      queries.template prefetch_here<T>(p, num_prefix, args.dq);
      store(weights + p * kLanes, exp<T>(product * args.scale - lse), Whole{});
    });
    for_products(dout_columns, values, n, num_prefix, [&](int64_t p, F32 product) MMPEFT_LAMBDA {
      queries.template prefetch_ahead<T>(p, num_prefix, args.dout, args.out, args.q);
      const F32 weight = load(weights + p * kLanes, Whole{});
      store(dscores + p * kLanes, weight * (product - delta) * args.scale, Whole{});
    });
    add_weighted(dq, count, token_words<T>(dscores, num_prefix, room), key_words, num_prefix, n,
                 [&](int i, int64_t d, auto part) MMPEFT_LAMBDA { return load(dq[i] + d, part); });
    add_outer_products(dscores, q, n, num_prefix, dk);
    add_outer_products(weights, dout, n, num_prefix, dv);
  }
}

}  // namespace MMPEFT_ISA
}  // namespace mmpeft
