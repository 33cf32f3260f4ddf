#include "csrc/cpu/ops.h"

namespace mmpeft {

namespace {

Prologue prologue_of(const char* op, std::string_view name) {
  if (name == "none") return Prologue::kNone;
  if (name == "rms_norm") return Prologue::kRmsNorm;
  MMPEFT_CHECK(op, name == "swiglu", "expected name none, rms_norm or swiglu, got ", name);
  return Prologue::kSwiglu;
}

const float* rstd_of(const char* op, const OptionalTensor& rstd, int64_t num_rows) {
  if (!rstd) return nullptr;
  check_tensor(op, "rstd", *rstd, {num_rows}, at::kFloat);
  return rstd->const_data_ptr<float>();
}

void check_matrix(const char* op, const char* name, const at::Tensor& tensor) {
  MMPEFT_CHECK(op, tensor.dim() == 2, "expected ", name, " of sizes [M, K], got ", tensor.sizes());
}

}  // namespace

void prologue(std::string_view name, const at::Tensor& x, const OptionalTensor& up, const OptionalTensor& gain,
              double eps, const OptionalTensor& in_scale, const OptionalTensor& rstd, const OptionalTensor& seed,
              double p, int64_t stream, const OptionalTensor& h, const OptionalTensor& dropped,
              const OptionalTensor& rstd_out) {
  constexpr const char* op = "prologue";
  check_matrix(op, "x", x);
  const int64_t num_rows = x.size(0), width = x.size(1);
  const at::ScalarType dtype = x.scalar_type();
  const Dtype dtype_idx = dtype_of(op, "x", x);
  const std::vector<float> gain_values = floats_of(op, "gain", gain, width);
  const std::vector<float> scale_values = floats_of(op, "in_scale", in_scale, width);
  PrologueArgs args{};
  args.name = prologue_of(op, name);
  args.width = width;
  args.eps = static_cast<float>(eps);
  args.x = rows_of(op, "x", x, num_rows, width, dtype);
  args.up = rows_of(op, "up", up, num_rows, width, dtype);
  args.gain = data_or_null(gain_values);
  args.in_scale = data_or_null(scale_values);
  args.rstd = rstd_of(op, rstd, num_rows);
  if (rstd_out) {
    check_output(op, "rstd_out", *rstd_out, {num_rows}, at::kFloat);
    args.rstd_out = rstd_out->mutable_data_ptr<float>();
  }
  args.h = rows_to_write(op, "h", h, num_rows, width, dtype);
  args.dropped = rows_to_write(op, "dropped", dropped, num_rows, width, dtype);
  args.dropout = dropout_of(op, seed, stream, p);
  if (!args.dropped.data) args.dropout.active = false;
  MMPEFT_CHECK(op, args.name != Prologue::kRmsNorm || gain, "expected gain [", width, "] for rms_norm, got none");
  MMPEFT_CHECK(op, args.name != Prologue::kSwiglu || up, "expected up [", num_rows, ", ", width,
               "] for swiglu, got none");
  const auto kernel = kernels().prologue[dtype_idx];
  parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void prologue_backward(std::string_view name, const at::Tensor& dh, const OptionalTensor& low, double low_factor,
                       const OptionalTensor& seed, double p, int64_t stream, const OptionalTensor& x,
                       const OptionalTensor& up, const OptionalTensor& gain, const OptionalTensor& in_scale,
                       const OptionalTensor& rstd, const OptionalTensor& dresidual, const OptionalTensor& dx,
                       const OptionalTensor& dup, const OptionalTensor& dropped, const OptionalTensor& dgain,
                       const OptionalTensor& din_scale) {
  constexpr const char* op = "prologue_backward";
  check_matrix(op, "dh", dh);
  const int64_t num_rows = dh.size(0), width = dh.size(1);
  const at::ScalarType dtype = dh.scalar_type();
  const Dtype dtype_idx = dtype_of(op, "dh", dh);
  const std::vector<float> gain_values = floats_of(op, "gain", gain, width);
  const std::vector<float> scale_values = floats_of(op, "in_scale", in_scale, width);
  PrologueBackwardArgs args{};
  args.name = prologue_of(op, name);
  args.width = width;
  args.dh = rows_of(op, "dh", dh, num_rows, width, dtype);
  args.low = rows_of(op, "low", low, num_rows, width, dtype);
  args.low_factor = static_cast<float>(low_factor);
  args.x = rows_of(op, "x", x, num_rows, width, dtype);
  args.up = rows_of(op, "up", up, num_rows, width, dtype);
  args.gain = data_or_null(gain_values);
  args.in_scale = data_or_null(scale_values);
  args.rstd = rstd_of(op, rstd, num_rows);
  args.dresidual = rows_of(op, "dresidual", dresidual, num_rows, width, dtype);
  args.dx = rows_to_write(op, "dx", dx, num_rows, width, dtype);
  args.dup = rows_to_write(op, "dup", dup, num_rows, width, dtype);
  args.dropped = rows_to_write(op, "dropped", dropped, num_rows, width, dtype);
  args.dropout = dropout_of(op, seed, stream, p);
  if (!args.dropped.data && !args.low.data) args.dropout.active = false;
  const bool is_norm = args.name == Prologue::kRmsNorm, is_swiglu = args.name == Prologue::kSwiglu;
  MMPEFT_CHECK(op, !is_norm || (x && gain && rstd), "expected x, gain and rstd for rms_norm, got ", !!x, ", ", !!gain,
               ", ", !!rstd, " (1: given)");
  MMPEFT_CHECK(op, !is_swiglu || (x && up), "expected x and up for swiglu, got ", !!x, ", ", !!up, " (1: given)");
  MMPEFT_CHECK(op, x || !(dropped || din_scale), "expected x where dropped or din_scale is wanted, got none");
  MMPEFT_CHECK(op, is_norm || !dgain, "expected dgain with rms_norm only, got it with ", name);
  MMPEFT_CHECK(op, is_swiglu || !dup, "expected dup with swiglu only, got it with ", name);
  MMPEFT_CHECK(op, !is_swiglu || !dresidual, "expected dresidual with one input only, got it with swiglu");
  for (const auto& [sum_name, sum] : {std::pair{"dgain", &dgain}, std::pair{"din_scale", &din_scale}})
    if (*sum) check_output(op, sum_name, **sum, {width}, at::kFloat);

  const auto kernel = kernels().prologue_backward[dtype_idx];
  const bool needs_scratch = is_norm && (low || in_scale);
  if (!dgain && !din_scale) {
    parallel_rows(num_rows, width, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(needs_scratch ? width : 0);
      kernel(args, begin, end, scratch.data(), nullptr, nullptr);
    });
    return;
  }
  const SumBlocks blocks(num_rows);
  std::vector<float> dgains(dgain ? blocks.count * width : 0), din_scales(din_scale ? blocks.count * width : 0);
  at::parallel_for(0, blocks.count, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(needs_scratch ? width : 0);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * blocks.rows_per_block, end = std::min(num_rows, begin + blocks.rows_per_block);
      kernel(args, begin, end, scratch.data(), dgain ? &dgains[i * width] : nullptr,
             din_scale ? &din_scales[i * width] : nullptr);
    }
  });
  if (dgain) add_in_order(dgains.data(), blocks.count, width, dgain->mutable_data_ptr<float>());
  if (din_scale) add_in_order(din_scales.data(), blocks.count, width, din_scale->mutable_data_ptr<float>());
}

}  // namespace mmpeft
