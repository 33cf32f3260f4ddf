#include "csrc/cpu/ops.h"

namespace mmpeft {

void keep_bits(const at::Tensor& seed, double p, int64_t stream, const at::Tensor& keep) {
  constexpr const char* op = "keep_bits";
  MMPEFT_CHECK(op, keep.dim() == 2, "expected keep of sizes [M, K], got ", keep.sizes());
  const at::ScalarType dtype = keep.scalar_type();
  MMPEFT_CHECK(op, dtype == at::kShort || dtype == at::kInt || dtype == at::kLong,
               "expected keep in Short, Int or Long, got ", dtype);
  const int64_t num_rows = keep.size(0), width = keep.size(1);
  KeepBitsArgs args{};
  args.keep = rows_to_write(op, "keep", keep, num_rows, width, dtype);
  args.itemsize = static_cast<int>(keep.element_size());
  args.width = width;
  args.dropout = dropout_of(op, seed, stream, p);
  const auto kernel = kernels().keep_bits;
  parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void activation(std::string_view name, const at::Tensor& a, const OptionalTensor& dz, const at::Tensor& out) {
  constexpr const char* op = "activation";
  constexpr std::string_view names[] = {"identity", "tanh", "relu", "gelu", "silu"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  MMPEFT_CHECK(op, found != std::end(names), "expected name identity, tanh, relu, gelu or silu, got ", name);
  MMPEFT_CHECK(op, a.dim() == 2, "expected a of sizes [M, R], got ", a.sizes());
  const Dtype dtype_idx = dtype_of(op, "a", a);
  const int64_t num_rows = a.size(0), width = a.size(1);
  ActivationArgs args{};
  args.activation = static_cast<Activation>(found - std::begin(names));
  args.width = width;
  args.a = rows_of(op, "a", a, num_rows, width, a.scalar_type());
  args.dz = rows_of(op, "dz", dz, num_rows, width, a.scalar_type());
  args.out = rows_to_write(op, "out", out, num_rows, width, a.scalar_type());
  const auto kernel = kernels().activation[dtype_idx];
  parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace mmpeft
