#include "csrc/cpu/ops.h"

namespace mmpeft {

void cross_entropy(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& count,
                   bool need_grad, const at::Tensor& loss) {
  constexpr const char* op = "cross_entropy";
  constexpr int64_t kIgnored = -100;
  MMPEFT_CHECK(op, logits.dim() == 2, "expected logits of sizes [S, V], got ", logits.sizes());
  const Dtype dtype_idx = dtype_of(op, "logits", logits);
  const int64_t num_rows = logits.size(0), num_words = logits.size(1);
  check_tensor(op, "labels", labels, {num_rows}, at::kLong);
  check_output(op, "loss", loss, {}, at::kFloat);
  MMPEFT_CHECK(op, count.device().is_cpu() && count.dim() == 0, "expected a 0-dim count on the CPU, got sizes ",
               count.sizes(), " on ", count.device());
  const double divisor = count.item().toDouble();
  std::vector<float> losses(num_rows);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_rows; ++i)
    MMPEFT_CHECK(op, label[i] == kIgnored || (label[i] >= 0 && label[i] < num_words), "expected labels in [0, ",
                 num_words, ") or ", kIgnored, ", got ", label[i], " in row ", i);
  CrossEntropyArgs args{};
  args.num_words = num_words;
  args.logits = rows_to_write(op, "logits", logits, num_rows, num_words, logits.scalar_type());
  args.labels = label;
  args.count = static_cast<float>(divisor);
  args.need_grad = need_grad;
  args.losses = losses.data();
  const auto kernel = kernels().cross_entropy[dtype_idx];
  parallel_rows(num_rows, num_words, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  double total = 0.0;
  for (const float row_loss : losses) total += row_loss;
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / divisor);
}

}  // namespace mmpeft
