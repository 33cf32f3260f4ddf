// The CUDA ops: their schemas and what runs them.
//
// After its tensors every op returns two sentences, what was refused and what failed, both empty after success. The ops
// take tensors of any device, so that one which is on no GPU is refused like the rest.
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>

#include "check_cuda.h"
#include "ops.h"

namespace mmpeft::cuda {
namespace {

template <auto entry>
struct Op;

template <typename... Results, typename... Arguments, std::tuple<Results...> (*entry)(Status&, Arguments...)>
struct Op<entry> {
  static std::tuple<Results..., std::string, std::string> run(Arguments... arguments) {
    Status status;
    std::tuple<Results...> results = entry(status, arguments...);
    return std::tuple_cat(std::move(results), std::tuple(std::move(status.refused), std::move(status.failed)));
  }
};

}  // namespace
}  // namespace mmpeft::cuda

TORCH_LIBRARY(mmpeft_fast_cuda, m) {
  m.def("lowrank_gemm_out(Tensor x, Tensor weight, Tensor? z, Tensor? u, float scaling, int[] num_outs, int[] ranks, bool transposed, Tensor? bias, Tensor? scale, Tensor? residual, Tensor(a!) out) -> (str, str)");
  m.def("dy_pass(Tensor dy, Tensor a, Tensor u, int[] num_outs, int[] ranks, float scaling, str activation, bool need_da, bool need_du) -> (Tensor, Tensor, str, str)");
}

TORCH_LIBRARY_IMPL(mmpeft_fast_cuda, CompositeExplicitAutograd, m) {
  using namespace mmpeft::cuda;
  m.impl("lowrank_gemm_out", &Op<&lowrank_gemm_out>::run);
  m.impl("dy_pass", &Op<&dy_pass>::run);
}
