// rewardfuse::approx_kl; the maths is in kernels/approx_kl/math.h.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "autograd/kl_options.h"
#include "autograd/ops.h"
#include "autograd/pairwise.h"

namespace rewardfuse {
namespace {

using pairwise::Inputs;

struct ApproxKlOp {
  static constexpr pairwise::Names names{"logprobs", "ref_logprobs", "importance_weight", "none"};
  static constexpr const char* forward_op = "rewardfuse::_approx_kl_forward";
  static constexpr const char* backward_op = "rewardfuse::_approx_kl_backward";

  static pairwise::Kernels kernels(at::ArrayRef<double> /*options*/) { return RF_PAIR_KERNELS(approx_kl); }

  static void raise_invalid(const Inputs&) {}

  static pairwise::Tensors3 differentiable_backward(const Inputs&, const at::Tensor&, const at::Tensor&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "approx_kl: a second derivative (create_graph=True) is not implemented");
  }
};

}  // namespace

at::Tensor approx_kl(const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                     const OptionalTensor& importance_weight, const OptionalTensor& mask,
                     double importance_weight_value, int64_t estimator, int64_t gradient_estimator, double input_low,
                     double input_high, double output_low, double output_high) {
  check_estimators(estimator, gradient_estimator);
  check_clamp("input_clamp", input_low, input_high);
  check_clamp("output_clamp", output_low, output_high);
  constexpr double kWeight = 1, kNoQ = 0, kNoNormalizer = 0;
  const pairwise::Numbers numbers{importance_weight_value,
                                  kWeight,
                                  kNoQ,
                                  kNoNormalizer,
                                  static_cast<double>(estimator),
                                  static_cast<double>(gradient_estimator),
                                  input_low,
                                  input_high,
                                  output_low,
                                  output_high};
  const OptionalTensor none;
  const at::Tensor constant = ref_logprobs.requires_grad() ? ref_logprobs.detach() : ref_logprobs;
  auto outputs = pairwise::PairLoss<ApproxKlOp>::apply(logprobs, constant, importance_weight, mask, none, none, none,
                                                       numbers, static_cast<int64_t>(Reduction::kNone), false);
  return std::move(outputs[0]);
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "approx_kl(Tensor logprobs, Tensor ref_logprobs, Tensor? importance_weight, Tensor? mask, "
      "float importance_weight_value, int estimator, int gradient_estimator, float input_low, float input_high, "
      "float output_low, float output_high) -> Tensor",
      &approx_kl);
  m.def(
      "_approx_kl_forward(Tensor logprobs, Tensor ref_logprobs, Tensor? importance_weight, Tensor? mask, "
      "Tensor? weight, Tensor? none, Tensor? normalizer, float[] numbers, int reduction, bool return_stats) "
      "-> (Tensor kl, Tensor stats, Tensor denominator)");
  m.def(
      "_approx_kl_backward(Tensor grad_output, Tensor logprobs, Tensor ref_logprobs, Tensor? importance_weight, "
      "Tensor? mask, Tensor? weight, Tensor? none, Tensor? normalizer, Tensor? denominator, float[] numbers, "
      "int reduction, bool need_logprobs, bool need_ref_logprobs, bool need_importance_weight) "
      "-> (Tensor, Tensor, Tensor)");
}

REWARDFUSE_REGISTER_PAIR_OP(ApproxKlOp, "_approx_kl_forward", "_approx_kl_backward")

}  // namespace rewardfuse
