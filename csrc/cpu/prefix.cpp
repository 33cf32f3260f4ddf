#include "csrc/cpu/ops.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <memory>

namespace mmpeft {

namespace {

// Two bfloat16 in a word, the first in its lower half.
uint32_t word_of(float first, float second) {
  return c10::BFloat16(first).x | static_cast<uint32_t>(c10::BFloat16(second).x) << 16;
}

// A prefix tensor [HK, P, DH] in the two forms that the kernels read again and again.
struct Table {
  at::Tensor values, words;

  Table(const at::Tensor& prefix, int tokens_in_a_word) : values(prefix.detach().to(at::kFloat).contiguous()) {
    words = values;
    if (tokens_in_a_word == 1) return;
    const int64_t heads = prefix.size(0), num_prefix = prefix.size(1), head_dim = prefix.size(2);
    const int64_t pairs = (num_prefix + 1) / 2;
    words = at::empty({heads, pairs, head_dim}, at::kInt);
    const float* from = values.const_data_ptr<float>();
    auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
    for (int64_t i = 0; i < heads * pairs; ++i) {
      const int64_t p = i % pairs * 2;
      const float* first = from + (i / pairs * num_prefix + p) * head_dim;
      for (int64_t d = 0; d < head_dim; ++d)
        to[i * head_dim + d] = word_of(first[d], p + 1 < num_prefix ? first[head_dim + d] : 0.0f);
    }
  }
};

PrefixTables tables_of(const Table& k, const Table& v) {
  auto words_of = [](const Table& table) { return static_cast<const uint32_t*>(table.words.const_data_ptr()); };
  return {k.values.size(1), k.values.const_data_ptr<float>(), v.values.const_data_ptr<float>(), words_of(k),
          words_of(v)};
}

void check_prefix(const char* op, const at::Tensor& prefix_k, const at::Tensor& prefix_v, const at::Tensor& q) {
  const int64_t heads = q.size(1), head_dim = q.size(3);
  MMPEFT_CHECK(op,
               prefix_k.dim() == 3 && prefix_k.size(0) > 0 && prefix_k.size(1) > 0 &&
                   heads % prefix_k.size(0) == 0 && prefix_k.size(2) == head_dim,
               "expected prefix_k of sizes [HK, P, ", head_dim, "], P > 0 and HK a divisor of ", heads, ", got ",
               prefix_k.sizes());
  MMPEFT_CHECK(op, prefix_v.sizes() == prefix_k.sizes(), "expected prefix_v of sizes ", prefix_k.sizes(), ", got ",
               prefix_v.sizes());
  for (const auto& [name, prefix] : {std::pair{"prefix_k", &prefix_k}, std::pair{"prefix_v", &prefix_v}})
    MMPEFT_CHECK(op, prefix->device().is_cpu() && at::isFloatingType(prefix->scalar_type()), "expected ", name,
                 " as floats on the CPU, got ", prefix->scalar_type(), " on ", prefix->device());
}

ConstHeads heads_of(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& q) {
  check_tensor(op, name, tensor, q.sizes(), q.scalar_type());
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
Heads heads_to_write(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& q) {
  check_output(op, name, tensor, q.sizes(), q.scalar_type());
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A [B, H, T] array in any layout.
void check_rows(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& q, at::ScalarType dtype) {
  MMPEFT_CHECK(op, tensor.device().is_cpu() && tensor.scalar_type() == dtype, "expected ", name, " in ", dtype,
               " on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  MMPEFT_CHECK(op, tensor.sizes() == q.sizes().slice(0, 3), "expected ", name, " of sizes ", q.sizes().slice(0, 3),
               ", got ", tensor.sizes());
}

// Blocks of rows of a key/value head whose sums are formed apart, and rows of a block: work for many threads, but
// partial sums that are small beside the rows.
constexpr int64_t kPrefixTasks = 64, kMinPrefixBlocks = 8, kMinPrefixRows = 128;

// Rows of one key/value head before those of the next, and heads of a task with more rows: heads of a token share pages
// of memory.
constexpr int64_t kPrefixRows = 256, kPrefixHeads = 8;

template <typename Value>
PerQuery<Value> per_query(Value* data, const at::Tensor& tensor) {
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Zeros that start at a cache line.
struct ZeroedScratch {
  std::vector<float> values;
  float* data;
  explicit ZeroedScratch(int64_t size) : values(size + 15) {
    void* begin = values.data();
    size_t space = values.size() * sizeof(float);
    data = static_cast<float*>(std::align(64, size * sizeof(float), begin, space));
  }
};

}  // namespace

void merge_prefix(const at::Tensor& q, const at::Tensor& prefix_k, const at::Tensor& prefix_v, double scale,
                  const OptionalTensor& alive, const at::Tensor& out, const at::Tensor& lse) {
  constexpr const char* op = "merge_prefix";
  MMPEFT_CHECK(op, q.dim() == 4, "expected q of sizes [B, H, T, DH], got ", q.sizes());
  const Dtype dtype_idx = dtype_of(op, "q", q);
  check_prefix(op, prefix_k, prefix_v, q);
  const int tokens_in_a_word = kernels().tokens_in_a_word[dtype_idx];
  const Table k(prefix_k, tokens_in_a_word), v(prefix_v, tokens_in_a_word);
  check_rows(op, "lse", lse, q, at::kFloat);
  MergePrefixArgs args{};
  args.length = q.size(2);
  args.head_dim = q.size(3);
  args.group_size = q.size(1) / prefix_k.size(0);
  args.scale = static_cast<float>(scale);
  args.q = heads_of(op, "q", q, q);
  args.prefix = tables_of(k, v);
  args.out = heads_to_write(op, "out", out, q);
  args.lse = per_query(lse.mutable_data_ptr<float>(), lse);
  if (alive) {
    check_rows(op, "alive", *alive, q, at::kBool);
    args.alive = per_query(alive->const_data_ptr<bool>(), *alive);
  }
  const auto kernel = kernels().merge_prefix[dtype_idx];
  const int64_t num_rows = q.size(0) * args.group_size * args.length;  // of one key/value head
  const int64_t kv_heads = prefix_k.size(0), num_blocks = (num_rows + kPrefixRows - 1) / kPrefixRows;
  const int64_t grain_width = std::min(num_rows, kPrefixRows) * args.head_dim;
  parallel_rows(num_blocks * kv_heads, grain_width, [&](int64_t begin, int64_t end) {
    ZeroedScratch scratch(prefix_scratch_size(args.prefix.num_prefix, args.head_dim));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / kv_heads * kPrefixRows;
      kernel(args, i % kv_heads, first, std::min(num_rows, first + kPrefixRows), scratch.data);
    }
  });
}

void prefix_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& prefix_k,
                     const at::Tensor& prefix_v, const at::Tensor& out, const at::Tensor& lse, double scale,
                     const at::Tensor& dq, const at::Tensor& dprefix_k, const at::Tensor& dprefix_v) {
  constexpr const char* op = "prefix_backward";
  MMPEFT_CHECK(op, q.dim() == 4, "expected q of sizes [B, H, T, DH], got ", q.sizes());
  const Dtype dtype_idx = dtype_of(op, "q", q);
  check_prefix(op, prefix_k, prefix_v, q);
  const int tokens_in_a_word = kernels().tokens_in_a_word[dtype_idx];
  const Table k(prefix_k, tokens_in_a_word), v(prefix_v, tokens_in_a_word);
  check_rows(op, "lse", lse, q, at::kFloat);
  const int64_t kv_heads = prefix_k.size(0), size = prefix_k.size(1) * prefix_k.size(2);
  for (const auto& [name, sum] : {std::pair{"dprefix_k", &dprefix_k}, std::pair{"dprefix_v", &dprefix_v}}) {
    check_output(op, name, *sum, prefix_k.sizes(), at::kFloat);
    MMPEFT_CHECK(op, sum->is_contiguous(), "expected a contiguous ", name, ", got strides ", sum->strides());
  }
  PrefixBackwardArgs args{};
  args.length = q.size(2);
  args.head_dim = q.size(3);
  args.group_size = q.size(1) / kv_heads;
  args.scale = static_cast<float>(scale);
  args.dout = heads_of(op, "dout", dout, q);
  args.q = heads_of(op, "q", q, q);
  args.out = heads_of(op, "out", out, q);
  args.prefix = tables_of(k, v);
  args.lse = per_query(lse.const_data_ptr<float>(), lse);
  args.dq = heads_to_write(op, "dq", dq, q);

  const int64_t num_rows = q.size(0) * args.group_size * args.length;  // of one key/value head
  const SumBlocks blocks(num_rows, std::max(kMinPrefixBlocks, kPrefixTasks / kv_heads), kMinPrefixRows);
  std::vector<float> dks(kv_heads * blocks.count * size), dvs(kv_heads * blocks.count * size);
  const auto kernel = kernels().prefix_backward[dtype_idx];
  const int64_t heads_together = blocks.rows_per_block > kPrefixRows ? kPrefixHeads : 1;
  const int64_t head_groups = (kv_heads + heads_together - 1) / heads_together;
  at::parallel_for(0, blocks.count * head_groups, 1, [&](int64_t first_task, int64_t last_task) {
    ZeroedScratch scratch(prefix_scratch_size(args.prefix.num_prefix, args.head_dim));
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t block = task / head_groups, first_head = task % head_groups * heads_together;
      const int64_t last_head = std::min(kv_heads, first_head + heads_together);
      const int64_t end = std::min(num_rows, (block + 1) * blocks.rows_per_block);
      for (int64_t begin = block * blocks.rows_per_block; begin < end; begin += kPrefixRows)
        for (int64_t head = first_head; head < last_head; ++head) {
          const int64_t sum = (head * blocks.count + block) * size;
          kernel(args, head, begin, std::min(end, begin + kPrefixRows), scratch.data, &dks[sum], &dvs[sum]);
        }
    }
  });
  for (int64_t head = 0; head < kv_heads; ++head) {
    const int64_t from = head * blocks.count * size;
    add_in_order(dks.data() + from, blocks.count, size, dprefix_k.mutable_data_ptr<float>() + head * size);
    add_in_order(dvs.data() + from, blocks.count, size, dprefix_v.mutable_data_ptr<float>() + head * size);
  }
}

}  // namespace mmpeft
