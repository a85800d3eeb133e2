// rewardfuse::bradley_terry_tie_loss; the maths is in kernels/bradley_terry_tie/math.h.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "autograd/ops.h"
#include "autograd/pairwise.h"

namespace rewardfuse {
namespace {

using pairwise::Inputs;

enum class TieModel : int64_t { kRaoKupper, kDavidson };

struct BradleyTerryTieOp {
  static constexpr pairwise::Names names{"first", "second", "log_tie", "outcome"};
  static constexpr const char* forward_op = "rewardfuse::_bradley_terry_tie_loss_forward";
  static constexpr const char* backward_op = "rewardfuse::_bradley_terry_tie_loss_backward";

  static bool is_davidson(at::ArrayRef<double> options) {
    return static_cast<TieModel>(static_cast<int64_t>(options[0])) == TieModel::kDavidson;
  }

  static pairwise::Kernels kernels(at::ArrayRef<double> options) {
    return is_davidson(options) ? RF_PAIR_KERNELS(davidson) : RF_PAIR_KERNELS(rao_kupper);
  }

  static void raise_invalid(const Inputs& in) {
    if (present(in.q)) {
      const at::Tensor known = (*in.q == 0).logical_or(*in.q == 0.5).logical_or(*in.q == 1);
      check_values("outcome", in.q, in, "1 (first wins), 0.5 (tie) or 0 (second wins)", known);
    }
    if (!present(in.p)) return;
    if (is_davidson(in.options())) {
      check_values("log_tie", in.p, in, "a number", in.p->eq(*in.p));
    } else {
      check_values("log_tie", in.p, in, "log θ ≥ 0", *in.p >= 0);
    }
  }

  static pairwise::Tensors3 differentiable_backward(const Inputs&, const at::Tensor&, const at::Tensor&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "bradley_terry_tie_loss: a second derivative (create_graph=True) is not implemented");
  }
};

}  // namespace

at::Tensor bradley_terry_tie_loss(const at::Tensor& first, const at::Tensor& second, const OptionalTensor& outcome,
                                  const OptionalTensor& log_tie, const OptionalTensor& mask,
                                  const OptionalTensor& weight, const OptionalTensor& normalizer, double outcome_value,
                                  double log_tie_value, double weight_value, double normalizer_value, int64_t model,
                                  int64_t reduction) {
  const pairwise::Numbers numbers{log_tie_value, weight_value, outcome_value, normalizer_value,
                                  static_cast<double>(model)};
  pairwise::check_public(BradleyTerryTieOp::names, {first, second, log_tie, mask, weight, outcome, normalizer, numbers,
                                                    static_cast<Reduction>(reduction)});
  TORCH_CHECK_VALUE(model == 0 || model == 1, "model: expected 0 (rao_kupper) or 1 (davidson), got ", model);
  check_number("outcome", outcome_value == 0 || outcome_value == 0.5 || outcome_value == 1,
               "1 (first wins), 0.5 (tie) or 0 (second wins)", outcome_value);
  check_number("log_tie", log_tie_value == log_tie_value, "a number", log_tie_value);
  if (model == 0) check_number("log_tie", log_tie_value >= 0, "log θ ≥ 0", log_tie_value);
  auto outputs = pairwise::PairLoss<BradleyTerryTieOp>::apply(first, second, log_tie, mask, weight, outcome, normalizer,
                                                              numbers, reduction, false);
  return std::move(outputs[0]);
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "bradley_terry_tie_loss(Tensor first, Tensor second, Tensor? outcome=None, Tensor? log_tie=None, "
      "Tensor? mask=None, Tensor? weight=None, Tensor? normalizer=None, float outcome_value=1, float log_tie_value=0, "
      "float weight_value=1, float normalizer_value=0, int model=0, int reduction=2) -> Tensor",
      &bradley_terry_tie_loss);
  m.def(
      "_bradley_terry_tie_loss_forward(Tensor first, Tensor second, Tensor? log_tie, Tensor? mask, Tensor? weight, "
      "Tensor? outcome, Tensor? normalizer, float[] numbers, int reduction, bool return_stats) "
      "-> (Tensor loss, Tensor stats, Tensor denominator)");
  m.def(
      "_bradley_terry_tie_loss_backward(Tensor grad_output, Tensor first, Tensor second, Tensor? log_tie, Tensor? "
      "mask, "
      "Tensor? weight, Tensor? outcome, Tensor? normalizer, Tensor? denominator, float[] numbers, int reduction, "
      "bool need_first, bool need_second, bool need_log_tie) -> (Tensor, Tensor, Tensor)");
}

REWARDFUSE_REGISTER_PAIR_OP(BradleyTerryTieOp, "_bradley_terry_tie_loss_forward", "_bradley_terry_tie_loss_backward")

}  // namespace rewardfuse
