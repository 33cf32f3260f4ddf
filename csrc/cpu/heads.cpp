#include "csrc/cpu/ops.h"

namespace mmpeft {

namespace {

ConstHeads heads_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
Heads heads_to_write(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Fills the fields that both directions have in common; `like` is the [B, heads, T, DH] array that is always there.
template <typename Args>
void fill(const char* op, Args& args, const at::Tensor& like, double eps, const std::vector<float>& scale,
          const std::vector<float>& gain, const OptionalTensor& cos, const OptionalTensor& sin) {
  const int64_t batch = like.size(0), length = like.size(2), head_dim = like.size(3);
  args.heads = like.size(1);
  args.head_dim = head_dim;
  args.length = length;
  args.eps = static_cast<float>(eps);
  args.scale = data_or_null(scale);
  args.gain = data_or_null(gain);
  MMPEFT_CHECK(op, cos.has_value() == sin.has_value(), "expected cos and sin or neither, got one of them");
  if (!cos) return;
  MMPEFT_CHECK(op, head_dim % 2 == 0, "expected an even head dimension for a rotation, got ", head_dim);
  args.angle_dtype = dtype_of(op, "cos", *cos);
  for (const auto& [name, tensor, array] :
       {std::tuple{"cos", &*cos, &args.cos}, std::tuple{"sin", &*sin, &args.sin}}) {
    MMPEFT_CHECK(op, tensor->dim() == 3 && (tensor->size(0) == batch || tensor->size(0) == 1), "expected ", name,
                 " of sizes [", batch, " or 1, ", length, ", ", head_dim, "], got ", tensor->sizes());
    check_tensor(op, name, *tensor, {tensor->size(0), length, head_dim}, cos->scalar_type());
    *array = {tensor->const_data_ptr(), tensor->size(0) == 1 ? 0 : tensor->stride(0), 0, tensor->stride(1)};
  }
}

void check_heads(const char* op, const char* name, const at::Tensor& tensor) {
  MMPEFT_CHECK(op, tensor.dim() == 4, "expected ", name, " of sizes [B, heads, T, DH], got ", tensor.sizes());
}

}  // namespace

void heads(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& gain, double eps,
           const OptionalTensor& cos, const OptionalTensor& sin, const at::Tensor& out) {
  constexpr const char* op = "heads";
  check_heads(op, "x", x);
  check_tensor(op, "x", x, x.sizes(), x.scalar_type());
  check_output(op, "out", out, x.sizes(), x.scalar_type());
  const Dtype dtype_idx = dtype_of(op, "x", x);
  const int64_t width = x.size(1) * x.size(3);
  const std::vector<float> scale_values = floats_of(op, "scale", scale, width);
  const std::vector<float> gain_values = floats_of(op, "gain", gain, x.size(3));
  HeadsArgs args{};
  fill(op, args, x, eps, scale_values, gain_values, cos, sin);
  args.x = heads_of(x);
  args.out = heads_to_write(out);
  const auto kernel = kernels().heads[dtype_idx];
  parallel_rows(x.size(0) * x.size(2), width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(heads_scratch_size(args.head_dim));
    kernel(args, begin, end, scratch.data());
  });
}

void heads_backward(const at::Tensor& dy, const OptionalTensor& x, const OptionalTensor& scale,
                    const OptionalTensor& gain, double eps, const OptionalTensor& cos, const OptionalTensor& sin,
                    const OptionalTensor& dx, const OptionalTensor& dscale, const OptionalTensor& dgain) {
  constexpr const char* op = "heads_backward";
  check_heads(op, "dy", dy);
  check_tensor(op, "dy", dy, dy.sizes(), dy.scalar_type());
  const Dtype dtype_idx = dtype_of(op, "dy", dy);
  const int64_t head_dim = dy.size(3), width = dy.size(1) * head_dim, num_rows = dy.size(0) * dy.size(2);
  const std::vector<float> scale_values = floats_of(op, "scale", scale, width);
  const std::vector<float> gain_values = floats_of(op, "gain", gain, head_dim);
  HeadsBackwardArgs args{};
  fill(op, args, dy, eps, scale_values, gain_values, cos, sin);
  args.dy = heads_of(dy);
  MMPEFT_CHECK(op, x || !(gain || dscale), "expected x where there is a gain or dscale is wanted, got none");
  MMPEFT_CHECK(op, gain || !dgain, "expected gain where dgain is wanted, got none");
  if (x) {
    check_tensor(op, "x", *x, dy.sizes(), dy.scalar_type());
    args.x = heads_of(*x);
  }
  if (dx) {
    check_output(op, "dx", *dx, dy.sizes(), dy.scalar_type());
    args.dx = heads_to_write(*dx);
  }
  if (dscale) check_output(op, "dscale", *dscale, {width}, at::kFloat);
  if (dgain) check_output(op, "dgain", *dgain, {head_dim}, at::kFloat);
  const auto kernel = kernels().heads_backward[dtype_idx];
  if (!dscale && !dgain) {
    parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(heads_scratch_size(head_dim));
      kernel(args, begin, end, scratch.data(), nullptr, nullptr);
    });
    return;
  }
  const SumBlocks blocks(num_rows);
  std::vector<float> dscales(dscale ? blocks.count * width : 0), dgains(dgain ? blocks.count * head_dim : 0);
  at::parallel_for(0, blocks.count, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(heads_scratch_size(head_dim));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * blocks.rows_per_block, end = std::min(num_rows, begin + blocks.rows_per_block);
      kernel(args, begin, end, scratch.data(), dscale ? &dscales[i * width] : nullptr,
             dgain ? &dgains[i * head_dim] : nullptr);
    }
  });
  if (dscale) add_in_order(dscales.data(), blocks.count, width, dscale->mutable_data_ptr<float>());
  if (dgain) add_in_order(dgains.data(), blocks.count, head_dim, dgain->mutable_data_ptr<float>());
}

}  // namespace mmpeft
