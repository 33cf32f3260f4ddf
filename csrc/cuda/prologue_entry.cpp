// Torch entries of prologue.cu and prologue_backward.cu.
#include "prologue.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "check_cuda.h"
#include "ops.h"

namespace mmpeft::cuda {
namespace {

PrologueKind kind_of(Status& status, std::string_view name) {
  constexpr std::string_view kNames[] = {"none", "rms_norm", "swiglu"};
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) return static_cast<PrologueKind>(i);
  }
  MMPEFT_EXPECT(status, false, "expected prologue none, rms_norm or swiglu, got ", name);
}

Dropout dropout_of(Status& status, const OptionalTensor& seed, double p, int64_t stream, const at::Tensor& like) {
  Dropout dropout;
  if (!seed.has_value()) return dropout;
  MMPEFT_EXPECT(status, p > 0.0 && p < 1.0, "expected 0 < p < 1 with a seed, got ", p);
  MMPEFT_EXPECT(status, seed->dim() == 0 && seed->scalar_type() == at::kLong && seed->device() == like.device(),
                "expected a 0-dim int64 seed on ", like.device(), ", got ", seed->sizes(), " ", seed->scalar_type(),
                " on ", seed->device());
  // To even at a tie, like Python's round: std::nearbyint under the default rounding mode.
  const double dropped = std::nearbyint(p * 65536);
  dropout.seed = seed->const_data_ptr<int64_t>();
  dropout.stream = static_cast<int>(stream);
  dropout.threshold = static_cast<int>(dropped) - 32768;
  dropout.inverse_keep = static_cast<float>(1.0 / (1.0 - dropped / 65536));
  return dropout;
}

// `like` is the [M, K] matrix whose dtype and device count: x, or dh where x is not needed.
PrologueInput input_of(Status& status, std::string_view name, const at::Tensor& like, const OptionalTensor& x,
                       const OptionalTensor& up, const OptionalTensor& gain, const OptionalTensor& in_scale,
                       const OptionalTensor& down, const OptionalTensor& seed, double p, int64_t stream) {
  MMPEFT_EXPECT(status, like.is_cuda() && like.dim() == 2, "expected a matrix on a GPU, got ", like.sizes(), " on ",
                like.device());
  const int64_t num_rows = like.size(0), width = like.size(1);
  PrologueInput input = {};
  input.dtype = half_dtype_of(status, "x", like);
  input.kind = kind_of(status, name);
  const bool is_norm = input.kind == PrologueKind::kRmsNorm, is_swiglu = input.kind == PrologueKind::kSwiGlu;
  MMPEFT_EXPECT(status, gain.has_value() == is_norm && up.has_value() == is_swiglu,
                "expected gain with rms_norm alone and up with swiglu alone, got prologue ", name,
                gain ? " with" : " without", " gain and", up ? " with" : " without", " up");
  MMPEFT_EXPECT(status, x.has_value() || input.kind == PrologueKind::kNone, "expected x with prologue ", name);
  if (x.has_value()) {
    if (!check_matrix(status, "x", *x, num_rows, width, like)) return {};
    input.x = x->const_data_ptr();
    input.stride_x = x->stride(0);
  }
  if (up.has_value()) {
    if (!check_matrix(status, "up", *up, num_rows, width, like)) return {};
    input.up = up->const_data_ptr();
    input.stride_up = up->stride(0);
  }
  input.gain = float_array(status, "gain", gain, {width}, like);
  input.in_scale = float_array(status, "in_scale", in_scale, {width}, like);
  if (down.has_value()) {
    MMPEFT_EXPECT(status, down->dim() == 2, "expected down [R, K], got ", down->sizes());
    input.rank = static_cast<int>(down->size(0));
    input.down = float_array(status, "down", down, {down->size(0), width}, like);
  }
  input.dropout = dropout_of(status, seed, p, stream, like);
  input.num_rows = static_cast<int>(num_rows);
  input.width = static_cast<int>(width);
  return input;
}

const float* rstd_data(Status& status, const at::Tensor& rstd, const at::Tensor& like) {
  if (!check_cuda_tensor(status, "rstd", rstd, {like.size(0)}, like)) return {};
  MMPEFT_EXPECT(status, rstd.scalar_type() == at::kFloat, "expected rstd in float32, got ", rstd.scalar_type());
  return rstd.const_data_ptr<float>();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prologue(
    Status& status, std::string_view name, const at::Tensor& x, const OptionalTensor& up, const OptionalTensor& gain,
    double eps, const OptionalTensor& in_scale, const OptionalTensor& rstd, const OptionalTensor& down,
    std::string_view activation, const OptionalTensor& seed, double p, int64_t stream, bool write_h) {
  status.op = "prologue";
  Prologue call = {};
  call.input = input_of(status, name, x, x, up, gain, in_scale, down, seed, p, stream);
  call.eps = static_cast<float>(eps);
  call.activation = activation_of(status, activation);
  const bool is_norm = call.input.kind == PrologueKind::kRmsNorm;
  if (rstd.has_value()) {
    MMPEFT_EXPECT(status, is_norm, "expected rstd with rms_norm alone, got prologue ", name);
    call.given_rstd = rstd_data(status, *rstd, x);
  }
  if (!status.ok()) return {};
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t num_rows = x.size(0), rank = call.input.rank;
  at::Tensor h, new_rstd, a, z;
  if (write_h) h = at::empty(x.sizes(), x.options());
  if (is_norm && !rstd.has_value()) new_rstd = at::empty({num_rows}, x.options().dtype(at::kFloat));
  // Without columns nothing runs: a is a sum of nothing, and every f(0) is 0.
  const auto empty_or_zeros = [&] {
    return x.size(1) == 0 ? at::zeros({num_rows, rank}, x.options()) : at::empty({num_rows, rank}, x.options());
  };
  if (rank > 0) a = empty_or_zeros();
  if (rank > 0 && call.activation != Activation::kIdentity) z = empty_or_zeros();
  if (x.numel() == 0) return {h, new_rstd, a, z};
  if (h.defined()) call.h = h.mutable_data_ptr();
  if (new_rstd.defined()) call.rstd = new_rstd.mutable_data_ptr<float>();
  if (a.defined()) call.a = a.mutable_data_ptr();
  if (z.defined()) call.z = z.mutable_data_ptr();
  status.launched(launch_prologue(call, c10::cuda::getCurrentCUDAStream(x.get_device())));
  return {h, new_rstd, a, z};
}

std::tuple<at::Tensor, at::Tensor> prologue_backward(
    Status& status, std::string_view name, at::Tensor& dh, const OptionalTensor& x, const OptionalTensor& up,
    const OptionalTensor& gain, const OptionalTensor& in_scale, const OptionalTensor& rstd, const OptionalTensor& da,
    const OptionalTensor& down, const OptionalTensor& seed, double p, int64_t stream, const OptionalTensor& dresidual,
    const std::optional<at::Tensor>& dx, const std::optional<at::Tensor>& dup, bool need_dgain, bool need_din_scale) {
  status.op = "prologue_backward";
  PrologueBackward call = {};
  call.input = input_of(status, name, dh, x, up, gain, in_scale, down, seed, p, stream);
  const int64_t num_rows = dh.size(0), width = dh.size(1);
  const bool is_norm = call.input.kind == PrologueKind::kRmsNorm;
  MMPEFT_EXPECT(status, rstd.has_value() == is_norm, "expected rstd with rms_norm alone, got prologue ", name,
                rstd ? " with" : " without", " rstd");
  MMPEFT_EXPECT(status, da.has_value() == down.has_value(), "expected da and down together, got only ",
                da ? "da" : "down");
  MMPEFT_EXPECT(status, is_norm || !need_dgain, "expected dgain to be wanted of rms_norm alone, got prologue ", name);
  MMPEFT_EXPECT(status, !need_din_scale || (in_scale.has_value() && x.has_value()),
                "expected in_scale and x where din_scale is wanted, got ", in_scale ? "no x" : "no in_scale");
  MMPEFT_EXPECT(status, !dup.has_value() || call.input.kind == PrologueKind::kSwiGlu,
                "expected dup to be wanted of swiglu alone, got prologue ", name);
  if (!check_matrix(status, "dh", dh, num_rows, width, dh, /*is_written=*/true)) return {};
  call.dh = dh.mutable_data_ptr();
  call.stride_dh = dh.stride(0);
  if (is_norm) call.rstd = rstd_data(status, *rstd, dh);
  if (da.has_value() && call.input.rank > 0) {
    if (!check_matrix(status, "da", *da, num_rows, call.input.rank, dh)) return {};
    call.da = da->const_data_ptr();
    call.stride_da = da->stride(0);
  }
  if (dresidual.has_value()) {
    if (!check_matrix(status, "dresidual", *dresidual, num_rows, width, dh)) return {};
    call.dresidual = dresidual->const_data_ptr();
    call.stride_dresidual = dresidual->stride(0);
  }
  if (dx.has_value()) {
    if (!check_matrix(status, "dx", *dx, num_rows, width, dh, /*is_written=*/true)) return {};
    call.dx = dx->mutable_data_ptr();
    call.stride_dx = dx->stride(0);
  }
  if (dup.has_value()) {
    if (!check_matrix(status, "dup", *dup, num_rows, width, dh, /*is_written=*/true)) return {};
    call.dup = dup->mutable_data_ptr();
    call.stride_dup = dup->stride(0);
  }
  if (!status.ok()) return {};
  const c10::cuda::CUDAGuard guard(dh.device());
  at::Tensor dgain, din_scale, dgain_partials, din_scale_partials;
  if (dh.numel() == 0) {
    if (need_dgain) dgain = at::zeros({width}, gain->options());
    if (need_din_scale) din_scale = at::zeros({width}, in_scale->options());
    return {dgain, din_scale};
  }
  if (!dx.has_value() && !dup.has_value() && !need_dgain && !need_din_scale) return {dgain, din_scale};
  const int64_t num_blocks = ceil_div(num_rows, int64_t{kPrologueRows});
  const auto floats = dh.options().dtype(at::kFloat);
  if (need_dgain) {
    dgain = at::empty({width}, gain->options());
    dgain_partials = at::empty({num_blocks, width}, floats);
    call.dgain = dgain.mutable_data_ptr();
    call.dgain_partials = dgain_partials.mutable_data_ptr<float>();
  }
  if (need_din_scale) {
    din_scale = at::empty({width}, in_scale->options());
    din_scale_partials = at::empty({num_blocks, width}, floats);
    call.din_scale = din_scale.mutable_data_ptr();
    call.din_scale_partials = din_scale_partials.mutable_data_ptr<float>();
  }
  status.launched(launch_prologue_backward(call, c10::cuda::getCurrentCUDAStream(dh.get_device())));
  return {dgain, din_scale};
}

}  // namespace mmpeft::cuda
