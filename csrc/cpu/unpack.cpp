#include "csrc/cpu/ops.h"

namespace mmpeft {

void unpack_4bit(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& code, int64_t blocksize,
                 const at::Tensor& out) {
  constexpr const char* op = "unpack_4bit";
  MMPEFT_CHECK(op, out.dim() == 2, "expected out of sizes [N, K], got ", out.sizes());
  MMPEFT_CHECK(op, blocksize >= kMostLanes && (blocksize & (blocksize - 1)) == 0,
               "expected a blocksize that is a power of two and at least ", kMostLanes, ", got ", blocksize);
  const int64_t num_rows = out.size(0), width = out.size(1), count = num_rows * width;
  check_tensor(op, "packed", packed, {(count + 1) / 2}, at::kByte);
  check_tensor(op, "scales", scales, {(count + blocksize - 1) / blocksize}, at::kFloat);
  check_tensor(op, "code", code, {16}, at::kFloat);
  Unpack4BitArgs args{};
  args.width = width;
  args.packed = packed.const_data_ptr<uint8_t>();
  args.scales = scales.const_data_ptr<float>();
  args.code = code.const_data_ptr<float>();
  while ((int64_t{1} << args.log2_blocksize) < blocksize) ++args.log2_blocksize;
  args.out = rows_to_write(op, "out", out, num_rows, width, out.scalar_type());
  const auto kernel = kernels().unpack_4bit[dtype_of(op, "out", out)];
  parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void unpack_8bit(const at::Tensor& values, const at::Tensor& scales, const at::Tensor& out) {
  constexpr const char* op = "unpack_8bit";
  MMPEFT_CHECK(op, out.dim() == 2, "expected out of sizes [N, K], got ", out.sizes());
  const int64_t num_rows = out.size(0), width = out.size(1);
  check_tensor(op, "scales", scales, {num_rows}, at::kFloat);
  Unpack8BitArgs args{};
  args.width = width;
  args.values = rows_of(op, "values", values, num_rows, width, at::kChar);
  args.scales = scales.const_data_ptr<float>();
  args.out = rows_to_write(op, "out", out, num_rows, width, out.scalar_type());
  const auto kernel = kernels().unpack_8bit[dtype_of(op, "out", out)];
  parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace mmpeft
