#include "csrc/cpu/ops.h"

namespace mmpeft {

namespace {

// Float copies of the prefix that the kernels read again and again, as tables of whole vectors.
struct Prefix {
  std::vector<float> k, v, k_transposed, v_transposed;
  PrefixTables tables;

  Prefix(const char* op, const at::Tensor& prefix_k, const at::Tensor& prefix_v, const at::Tensor& q) {
    const int64_t heads = q.size(1), head_dim = q.size(3);
    MMPEFT_CHECK(op,
                 prefix_k.dim() == 3 && prefix_k.size(0) > 0 && prefix_k.size(1) > 0 &&
                     heads % prefix_k.size(0) == 0 && prefix_k.size(2) == head_dim,
                 "expected prefix_k of sizes [HK, P, ", head_dim, "], P > 0 and HK a divisor of ", heads, ", got ",
                 prefix_k.sizes());
    MMPEFT_CHECK(op, prefix_v.sizes() == prefix_k.sizes(), "expected prefix_v of sizes ", prefix_k.sizes(), ", got ",
                 prefix_v.sizes());
    const int64_t kv_heads = prefix_k.size(0), num_prefix = prefix_k.size(1);
    const int64_t lanes = kernels().lanes, padded = (num_prefix + lanes - 1) / lanes * lanes;
    k = floats_of(op, "prefix_k", prefix_k.reshape(-1), prefix_k.numel());
    v = floats_of(op, "prefix_v", prefix_v.reshape(-1), prefix_v.numel());
    k_transposed = transposed(k, kv_heads, num_prefix, head_dim, padded);
    v_transposed = transposed(v, kv_heads, num_prefix, head_dim, padded);
    tables = {num_prefix, padded, k.data(), v.data(), k_transposed.data(), v_transposed.data()};
  }

  static std::vector<float> transposed(const std::vector<float>& from, int64_t heads, int64_t num_prefix,
                                       int64_t head_dim, int64_t padded) {
    std::vector<float> to(heads * head_dim * padded);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t p = 0; p < num_prefix; ++p)
        for (int64_t d = 0; d < head_dim; ++d)
          to[(h * head_dim + d) * padded + p] = from[(h * num_prefix + p) * head_dim + d];
    return to;
  }
};

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

}  // namespace

void merge_prefix(const at::Tensor& q, const at::Tensor& prefix_k, const at::Tensor& prefix_v, double scale,
                  const OptionalTensor& alive, const at::Tensor& out, const at::Tensor& lse) {
  constexpr const char* op = "merge_prefix";
  MMPEFT_CHECK(op, q.dim() == 4, "expected q of sizes [B, H, T, DH], got ", q.sizes());
  const Dtype dtype_idx = dtype_of(op, "q", q);
  const Prefix prefix(op, prefix_k, prefix_v, q);
  check_rows(op, "lse", lse, q, at::kFloat);
  MergePrefixArgs args{};
  args.heads = q.size(1);
  args.length = q.size(2);
  args.head_dim = q.size(3);
  args.group_size = q.size(1) / prefix_k.size(0);
  args.scale = static_cast<float>(scale);
  args.q = heads_of(op, "q", q, q);
  args.prefix = prefix.tables;
  args.out = heads_to_write(op, "out", out, q);
  args.lse = lse.mutable_data_ptr<float>();
  args.lse_batch = lse.stride(0), args.lse_head = lse.stride(1), args.lse_token = lse.stride(2);
  if (alive) {
    check_rows(op, "alive", *alive, q, at::kBool);
    args.alive = alive->const_data_ptr<bool>();
    args.alive_batch = alive->stride(0), args.alive_head = alive->stride(1), args.alive_token = alive->stride(2);
  }
  const auto kernel = kernels().merge_prefix[dtype_idx];
  parallel_rows(q.size(0) * q.size(1) * q.size(2), args.head_dim * prefix.tables.num_prefix,
                [&](int64_t begin, int64_t end) {
                  std::vector<float> scratch(prefix.tables.padded + args.head_dim);
                  kernel(args, begin, end, scratch.data());
                });
}

void prefix_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& prefix_k,
                     const at::Tensor& prefix_v, const at::Tensor& out, const at::Tensor& lse, double scale,
                     const at::Tensor& dq, const at::Tensor& dprefix_k, const at::Tensor& dprefix_v) {
  constexpr const char* op = "prefix_backward";
  MMPEFT_CHECK(op, q.dim() == 4, "expected q of sizes [B, H, T, DH], got ", q.sizes());
  const Dtype dtype_idx = dtype_of(op, "q", q);
  const Prefix prefix(op, prefix_k, prefix_v, q);
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
  args.prefix = prefix.tables;
  args.lse = lse.const_data_ptr<float>();
  args.lse_batch = lse.stride(0), args.lse_head = lse.stride(1), args.lse_token = lse.stride(2);
  args.dq = heads_to_write(op, "dq", dq, q);

  const int64_t num_rows = q.size(0) * args.group_size * args.length;  // of one key/value head
  const SumBlocks blocks(num_rows);
  std::vector<float> dks(kv_heads * blocks.count * size), dvs(kv_heads * blocks.count * size);
  const auto kernel = kernels().prefix_backward[dtype_idx];
  at::parallel_for(0, kv_heads * blocks.count, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(16 * (prefix.tables.padded + args.head_dim));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks.count * blocks.rows_per_block;
      kernel(args, i / blocks.count, begin, std::min(num_rows, begin + blocks.rows_per_block), scratch.data(),
             &dks[i * size], &dvs[i * size]);
    }
  });
  for (int64_t head = 0; head < kv_heads; ++head) {
    const int64_t from = head * blocks.count * size;
    add_in_order(dks.data() + from, blocks.count, size, dprefix_k.mutable_data_ptr<float>() + head * size);
    add_in_order(dvs.data() + from, blocks.count, size, dprefix_v.mutable_data_ptr<float>() + head * size);
  }
}

}  // namespace mmpeft
