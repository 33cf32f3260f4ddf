// Torch entry of dy_pass.cu.
#include "dy_pass.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "check_cuda.h"
#include "ops.h"

namespace mmpeft::cuda {

std::tuple<at::Tensor, at::Tensor> dy_pass(Status& status, const at::Tensor& dy, const at::Tensor& a,
                                           const at::Tensor& u, at::IntArrayRef num_outs, at::IntArrayRef ranks,
                                           double scaling,
                                           std::string_view activation, bool need_da, bool need_du) {
  status.op = "dy_pass";
  MMPEFT_EXPECT(status, dy.is_cuda() && dy.dim() == 2 && a.dim() == 2 && u.dim() == 2,
                "expected matrices dy, a and u on a GPU, got dy ", dy.sizes(), " on ", dy.device(), ", a ", a.sizes(),
                " and u ", u.sizes());
  const int64_t num_rows = dy.size(0), num_out = dy.size(1), sum_of_ranks = a.size(1), width = u.size(1);
  DyPass pass = {};
  pass.dtype = half_dtype_of(status, "dy", dy);
  check_matrix(status, "dy", dy, num_rows, num_out, dy);
  check_matrix(status, "a", a, num_rows, sum_of_ranks, dy);
  pass.u = float_array(status, "u", u, {num_out, width}, dy);
  int64_t largest = 0;
  for (const int64_t rank : ranks) largest = std::max(largest, rank);
  MMPEFT_EXPECT(status, width >= largest, "expected u with at least ", largest, " columns, got ", u.sizes());
  pass.tile = dy_pass_tile(static_cast<int>(largest));
  pass.segments = segment_table(status, num_outs, ranks, num_out, sum_of_ranks, pass.tile.block_n);
  pass.activation = activation_of(status, activation);
  if (!status.ok()) return {};
  const c10::cuda::CUDAGuard guard(dy.device());
  at::Tensor da, du;
  if (need_da) da = at::empty({num_rows, sum_of_ranks}, dy.options());
  if (num_rows == 0 || width == 0) {
    if (need_du) du = at::zeros({num_out, width}, u.options());
    return {da, du};
  }
  if (need_du) du = at::empty({num_out, width}, u.options());
  if (!need_da && !need_du) return {da, du};

  const int device = dy.get_device();
  const int num_blocks_r = ceil_div(static_cast<int>(width), pass.tile.block_r);
  MMPEFT_EXPECT(status, num_blocks_r < 65536, "expected u with fewer columns, got ", u.sizes());
  pass.dy = dy.const_data_ptr();
  pass.a = a.const_data_ptr();
  pass.stride_dy = dy.stride(0);
  pass.stride_a = a.stride(0);
  pass.num_rows = static_cast<int>(num_rows);
  pass.num_out = static_cast<int>(num_out);
  pass.sum_of_ranks = static_cast<int>(sum_of_ranks);
  pass.width = static_cast<int>(width);
  const int num_multiprocessors = device_attribute(status, cudaDevAttrMultiProcessorCount, device);
  if (!status.ok()) return {};
  pass.rows_per_chunk = dy_pass_rows_per_chunk(pass.num_rows, pass.segments.num_tiles * num_blocks_r,
                                               num_multiprocessors);
  pass.scaling = static_cast<float>(scaling);
  const auto floats = dy.options().dtype(at::kFloat);
  at::Tensor dz_partials, du_partials;
  if (need_da) {
    dz_partials = at::empty({pass.segments.num_tiles, num_rows, width}, floats);
    pass.dz_partials = dz_partials.mutable_data_ptr<float>();
    pass.da = da.mutable_data_ptr();
  }
  if (need_du) {
    du_partials = at::empty({ceil_div(pass.num_rows, pass.rows_per_chunk), num_out, width}, floats);
    pass.du_partials = du_partials.mutable_data_ptr<float>();
    pass.du = du.mutable_data_ptr();
  }
  status.launched(launch_dy_pass(pass, c10::cuda::getCurrentCUDAStream(device)));
  return {da, du};
}

}  // namespace mmpeft::cuda
