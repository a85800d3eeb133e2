// rewardfuse::bradley_terry_loss; the maths is in kernels/bradley_terry/math.h.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "autograd/ops.h"
#include "autograd/pairwise.h"

namespace rewardfuse {
namespace {

using pairwise::Inputs;

struct BradleyTerryOp {
  static constexpr pairwise::Names names{"chosen", "rejected", "margin", "target"};
  static constexpr const char* forward_op = "rewardfuse::_bradley_terry_loss_forward";
  static constexpr const char* backward_op = "rewardfuse::_bradley_terry_loss_backward";

  static pairwise::Kernels kernels(at::ArrayRef<double> /*options*/) { return RF_PAIR_KERNELS(bradley_terry); }

  static void raise_invalid(const Inputs& in) {
    if (!present(in.q)) return;
    check_values("target", in.q, in, "values from 0 to 1", (*in.q >= 0).logical_and(*in.q <= 1));
  }

  // dℓ/dz = (1 − t)σ(z) − tσ(−z) and the centering term, as ATen ops that autograd can differentiate again.
  static pairwise::Tensors3 differentiable_backward(const Inputs& in, const at::Tensor& grad_output,
                                                    const at::Tensor& denominator) {
    const double smoothing = in.options()[0], beta = in.options()[1], center = in.options()[2];
    const pairwise::Selected x(in);
    const at::Tensor z = (x.a * 0.5 - x.b * 0.5) * (2 * beta) - x.p;
    const at::Tensor t = x.q * (1 - 2 * smoothing) + smoothing;
    const at::Tensor scale = x.scale(in, grad_output, denominator);
    const at::Tensor d_z = scale * ((1 - t) * z.sigmoid() - t * z.neg().sigmoid());
    const at::Tensor d_center = scale * (x.a * 0.5 + x.b * 0.5) * (4 * center);
    return {x.gradient_like(in.a, d_z * beta + d_center), x.gradient_like(in.b, d_center - d_z * beta),
            present(in.p) ? x.gradient_like(*in.p, -d_z) : at::Tensor()};
  }
};

}  // namespace

LossAndStats bradley_terry_loss(const at::Tensor& chosen, const at::Tensor& rejected, const OptionalTensor& margin,
                                const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& target,
                                const OptionalTensor& normalizer, double margin_value, double weight_value,
                                double target_value, double normalizer_value, double label_smoothing, double beta,
                                double center_rewards_coefficient, int64_t reduction, bool return_stats) {
  const pairwise::Numbers numbers{
      margin_value, weight_value, target_value, normalizer_value, label_smoothing, beta, center_rewards_coefficient};
  pairwise::check_public(BradleyTerryOp::names, {chosen, rejected, margin, mask, weight, target, normalizer, numbers,
                                                 static_cast<Reduction>(reduction)});
  check_number("target", target_value >= 0 && target_value <= 1, "from 0 to 1", target_value);
  check_number("label_smoothing", label_smoothing >= 0 && label_smoothing <= 0.5, "from 0 to 0.5", label_smoothing);
  check_number("beta", std::isfinite(beta) && beta > 0, "positive and finite", beta);
  check_number("center_rewards_coefficient",
               std::isfinite(center_rewards_coefficient) && center_rewards_coefficient >= 0, "finite and not negative",
               center_rewards_coefficient);
  auto outputs = pairwise::PairLoss<BradleyTerryOp>::apply(chosen, rejected, margin, mask, weight, target, normalizer,
                                                           numbers, reduction, return_stats);
  return {std::move(outputs[0]), std::move(outputs[1])};
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "bradley_terry_loss(Tensor chosen, Tensor rejected, Tensor? margin=None, Tensor? mask=None, Tensor? weight=None, "
      "Tensor? target=None, Tensor? normalizer=None, float margin_value=0, float weight_value=1, float target_value=1, "
      "float normalizer_value=0, float label_smoothing=0, float beta=1, float center_rewards_coefficient=0, "
      "int reduction=2, bool return_stats=False) -> (Tensor loss, Tensor stats)",
      &bradley_terry_loss);
  m.def(
      "_bradley_terry_loss_forward(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? mask, Tensor? weight, "
      "Tensor? target, Tensor? normalizer, float[] numbers, int reduction, bool return_stats) "
      "-> (Tensor loss, Tensor stats, Tensor denominator)");
  m.def(
      "_bradley_terry_loss_backward(Tensor grad_output, Tensor chosen, Tensor rejected, Tensor? margin, Tensor? mask, "
      "Tensor? weight, Tensor? target, Tensor? normalizer, Tensor? denominator, float[] numbers, int reduction, "
      "bool need_chosen, bool need_rejected, bool need_margin) -> (Tensor, Tensor, Tensor)");
}

REWARDFUSE_REGISTER_PAIR_OP(BradleyTerryOp, "_bradley_terry_loss_forward", "_bradley_terry_loss_backward")

}  // namespace rewardfuse
