// rewardfuse::all_pairs_loss; the maths is in kernels/all_pairs/math.h.
#include "all_pairs/args.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/lists.h"
#include "autograd/lists_cuda.h"
#include "autograd/ops.h"

namespace rewardfuse::all_pairs {
namespace {

using lists::Tensors4;

const OptionalTensor kNone;

struct Inputs {
  lists::Inputs lists;
  const at::Tensor& labels;      // [*, K]
  const OptionalTensor& margin;  // []
  double margin_value;
};

void check(const Inputs& in) {
  const auto& scores = in.lists.scores;
  check_constant("labels", in.labels);
  check_constant("margin", in.margin);
  check_constant("weight", in.lists.weight);
  check_constant("normalizer", in.lists.normalizer);
  lists::check_items(in.lists);
  check_like("labels", in.labels, "scores", scores);
  check_per_item("labels", in.labels, "scores", scores);
  TORCH_CHECK_VALUE(!present(in.margin) || in.margin->dim() == 0,
                    "margin: expected a number or a 0-d tensor, got shape ", in.margin->sym_sizes());
  check_per_item("margin", in.margin, "scores", scores);
  lists::check_weight(in.lists);
  check_reduction(in.lists.reduction, in.lists.normalizer, in.lists.normalizer_value, "scores", scores);
}

// The tensors as a kernel sees them.
struct Kernel {
  explicit Kernel(const Inputs& in) : view(in.lists) {
    problem.lists = view.lists;
    view.per_item(problem.labels, in.labels);
    problem.margin.value = in.margin_value;
    if (present(in.margin)) view.per_list(problem.margin, *in.margin);
  }

  lists::View view;
  Problem problem;
};

// Names the first label that is not finite. Slow: only on the way to an error.
[[noreturn]] void raise_bad_label(const Inputs& in, const Problem& /*problem*/) {
  at::Tensor bad = in.labels.isfinite().logical_not();
  if (present(in.lists.mask)) bad = bad.logical_and(*in.lists.mask);
  if (present(in.lists.lengths)) {
    const at::Tensor place = at::arange(in.labels.size(-1), in.lists.lengths->options());
    bad = bad.logical_and(place < in.lists.lengths->unsqueeze(-1));
  }
  if (present(in.lists.weight)) bad = bad.logical_and((*in.lists.weight != 0).unsqueeze(-1));
  const int64_t index = bad.flatten().nonzero()[0].item().toLong();
  TORCH_CHECK_VALUE(false, "labels: expected finite numbers, got ", in.labels.flatten()[index].item().toDouble(),
                    " at index ", index);
}

// The number of each list's pairs.
at::Tensor empty_saved(const lists::Inputs& in) {
  c10::SymInt count = 1;
  for (const auto& size : in.shape()) count = count * size;
  return at::empty_symint({count}, in.scores.options().dtype(at::kDouble));
}

struct Op {
  using Kernel = all_pairs::Kernel;
  static constexpr auto launch_forward = &lists::launch_all_pairs_forward;
  static constexpr auto launch_backward = &lists::launch_all_pairs_backward;
  static constexpr auto raise_invalid = &raise_bad_label;
  static const auto& cpu() { return all_pairs_kernels_cpu(); }
};

Tensors4 forward(const Inputs& in) {
  check(in);
  return lists::forward<Op>(in, empty_saved(in.lists));
}

at::Tensor backward(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& list_loss,
                    const at::Tensor& pairs, const at::Tensor& denominator) {
  check(in);
  lists::check_backward(in.lists, grad_output, list_loss, denominator);
  const at::Tensor expected = empty_saved(in.lists);
  TORCH_CHECK_VALUE(pairs.sym_sizes() == expected.sym_sizes() && pairs.scalar_type() == expected.scalar_type() &&
                        pairs.device() == in.lists.scores.device() && pairs.is_contiguous(),
                    "pairs: expected the tensor that forward returned");
  return lists::backward<Op>(in, grad_output, list_loss, pairs, denominator);
}

#define RF_INPUTS                        \
  Inputs {                               \
    {scores,                             \
     kNone,                              \
     lengths,                            \
     mask,                               \
     weight,                             \
     normalizer,                         \
     weight_value,                       \
     normalizer_value,                   \
     static_cast<Reduction>(reduction)}, \
        labels, margin, margin_value     \
  }

Tensors4 forward_kernel(const at::Tensor& scores, const at::Tensor& labels, const OptionalTensor& lengths,
                        const OptionalTensor& mask, const OptionalTensor& margin, const OptionalTensor& weight,
                        const OptionalTensor& normalizer, double margin_value, double weight_value,
                        double normalizer_value, int64_t reduction) {
  return forward(RF_INPUTS);
}

at::Tensor backward_kernel(const at::Tensor& grad_output, const at::Tensor& scores, const at::Tensor& labels,
                           const OptionalTensor& lengths, const OptionalTensor& mask, const OptionalTensor& margin,
                           const OptionalTensor& weight, const OptionalTensor& normalizer, const at::Tensor& list_loss,
                           const at::Tensor& pairs, const at::Tensor& denominator, double margin_value,
                           double weight_value, double normalizer_value, int64_t reduction) {
  return backward(RF_INPUTS, grad_output, list_loss, pairs, denominator);
}

class AllPairs : public torch::autograd::Function<AllPairs> {
 public:
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  static constexpr int kArguments = 11, kTensors = 7;

  static at::Tensor forward(Context* ctx, const at::Tensor& scores, const at::Tensor& labels,
                            const OptionalTensor& lengths, const OptionalTensor& mask, const OptionalTensor& margin,
                            const OptionalTensor& weight, const OptionalTensor& normalizer, double margin_value,
                            double weight_value, double normalizer_value, int64_t reduction) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_all_pairs_loss_forward", "")
                               .typed<decltype(forward_kernel)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, list_loss, pairs, denominator] = op.call(scores, labels, lengths, mask, margin, weight, normalizer,
                                                         margin_value, weight_value, normalizer_value, reduction);
    const auto keep = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
    ctx->save_for_backward({scores, labels, keep(lengths), keep(mask), keep(margin), keep(weight), keep(normalizer),
                            none ? loss : list_loss, pairs, denominator});
    ctx->saved_data["margin_value"] = margin_value;
    ctx->saved_data["weight_value"] = weight_value;
    ctx->saved_data["normalizer_value"] = normalizer_value;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static Variables backward(Context* ctx, Variables grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "all_pairs_loss: a second derivative (create_graph=True) is not implemented");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_all_pairs_loss_backward", "")
                               .typed<decltype(backward_kernel)>();
    const auto t = ctx->get_saved_variables();
    const auto optional = [&](int i) { return t[i].defined() ? OptionalTensor(t[i]) : std::nullopt; };
    at::AutoDispatchBelowADInplaceOrView guard;
    Variables gradients(kArguments);
    gradients[0] = op.call(grad_outputs[0], t[0], t[1], optional(2), optional(3), optional(4), optional(5), optional(6),
                           t[kTensors], t[kTensors + 1], t[kTensors + 2], ctx->saved_data["margin_value"].toDouble(),
                           ctx->saved_data["weight_value"].toDouble(), ctx->saved_data["normalizer_value"].toDouble(),
                           ctx->saved_data["reduction"].toInt());
    return gradients;
  }
};

}  // namespace
}  // namespace rewardfuse::all_pairs

namespace rewardfuse {

at::Tensor all_pairs_loss(const at::Tensor& scores, const at::Tensor& labels, const OptionalTensor& lengths,
                          const OptionalTensor& mask, const OptionalTensor& margin, const OptionalTensor& weight,
                          const OptionalTensor& normalizer, double margin_value, double weight_value,
                          double normalizer_value, int64_t reduction) {
  check_constant("labels", labels);
  check_constant("margin", margin);
  check_constant("weight", weight);
  check_constant("normalizer", normalizer);
  return all_pairs::AllPairs::apply(scores, labels, lengths, mask, margin, weight, normalizer, margin_value,
                                    weight_value, normalizer_value, reduction);
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "all_pairs_loss(Tensor scores, Tensor labels, Tensor? lengths=None, Tensor? mask=None, Tensor? margin=None, "
      "Tensor? weight=None, Tensor? normalizer=None, float margin_value=0, float weight_value=1, "
      "float normalizer_value=0, int reduction=2) -> Tensor",
      &all_pairs_loss);
  m.def(
      "_all_pairs_loss_forward(Tensor scores, Tensor labels, Tensor? lengths, Tensor? mask, Tensor? margin, "
      "Tensor? weight, Tensor? normalizer, float margin_value, float weight_value, float normalizer_value, "
      "int reduction) -> (Tensor loss, Tensor list_loss, Tensor pairs, Tensor denominator)");
  m.def(
      "_all_pairs_loss_backward(Tensor grad_output, Tensor scores, Tensor labels, Tensor? lengths, Tensor? mask, "
      "Tensor? margin, Tensor? weight, Tensor? normalizer, Tensor list_loss, Tensor pairs, Tensor denominator, "
      "float margin_value, float weight_value, float normalizer_value, int reduction) -> Tensor");
}

REWARDFUSE_REGISTER_LIST_OP("_all_pairs_loss", all_pairs::forward_kernel, all_pairs::backward_kernel)

}  // namespace rewardfuse
