// rewardfuse::plackett_luce_loss; the maths is in kernels/plackett_luce/math.h.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/lists.h"
#include "autograd/lists_cuda.h"
#include "autograd/ops.h"
#include "plackett_luce/args.h"

namespace rewardfuse::plackett_luce {
namespace {

using lists::Tensors4;

struct Inputs {
  lists::Inputs lists;
  const OptionalTensor& order;            // [*, N] or [total] integers
  const OptionalTensor& top_k;            // [*] integers
  const OptionalTensor& position_weight;  // [N], [*, N] or [total]
  const OptionalTensor& item_weight;      // likewise
  int64_t top_k_value;
};

void check(const Inputs& in) {
  const auto& scores = in.lists.scores;
  check_constant("position_weight", in.position_weight);
  check_constant("weight", in.lists.weight);
  check_constant("normalizer", in.lists.normalizer);
  lists::check_items(in.lists);
  if (present(in.order)) {
    lists::check_integers("order", *in.order);
    check_like("order", *in.order, "scores", scores);
  }
  if (present(in.top_k)) lists::check_integers("top_k", *in.top_k);
  lists::check_per_list("top_k", in.top_k, in.lists, false);
  TORCH_CHECK_VALUE(in.top_k_value >= 0, "top_k: expected at least 1, got ", in.top_k_value);
  lists::check_by_position("position_weight", in.position_weight, scores);
  lists::check_by_position("item_weight", in.item_weight, scores);
  lists::check_weight(in.lists);
  check_reduction(in.lists.reduction, in.lists.normalizer, in.lists.normalizer_value, "scores", scores);
}

// The tensors as a kernel sees them.
struct Kernel {
  explicit Kernel(const Inputs& in) : view(in.lists) {
    problem.lists = view.lists;
    problem.top_k_value = in.top_k_value;
    problem.position_weight.value = problem.item_weight.value = 1;
    if (present(in.order)) view.per_item(problem.order, *in.order);
    if (present(in.top_k)) problem.top_k = view.integers(*in.top_k);
    if (present(in.position_weight)) view.per_item(problem.position_weight, *in.position_weight);
    if (present(in.item_weight)) view.per_item(problem.item_weight, *in.item_weight);
    if (in.lists.scores.is_cuda()) return;
    for (int64_t r = 0; problem.top_k && r < problem.lists.count; ++r) {
      TORCH_CHECK_VALUE(problem.top_k[r] >= 1, "top_k: expected at least 1, got ", problem.top_k[r], " at list ", r);
    }
  }

  lists::View view;
  Problem problem;
};

// Names the first list whose order is none. Slow: only on the way to an error.
[[noreturn]] void raise_bad_order(const Inputs& in, const Problem& problem) {
  const auto& lists = problem.lists;
  const at::Tensor order = in.order->to(at::kLong).contiguous();
  const at::Tensor mask = present(in.lists.mask) ? in.lists.mask->contiguous() : at::Tensor();
  for (int64_t r = 0; r < lists.count; ++r) {
    const int64_t begin = lists.cu_seqlens ? lists.cu_seqlens[r] : r * lists.size;
    const int64_t places = lists.cu_seqlens ? lists.cu_seqlens[r + 1] - begin : lists.size;
    const bool* there = mask.defined() ? mask.const_data_ptr<bool>() + begin : nullptr;
    std::vector<bool> wanted(places);
    for (int64_t i = 0; i < places; ++i) wanted[i] = there ? there[i] : !lists.lengths || i < lists.lengths[r];
    const int64_t count = std::count(wanted.begin(), wanted.end(), true);
    const int64_t* entries = order.const_data_ptr<int64_t>() + begin;
    bool good = true;
    for (int64_t i = 0; i < count; ++i) {
      good = good && entries[i] >= 0 && entries[i] < places && wanted[entries[i]];
      if (good) wanted[entries[i]] = false;
    }
    if (good) continue;
    constexpr int64_t kShown = 16;
    std::string came = "[";
    for (int64_t i = 0; i < std::min(count, kShown); ++i) came += (i ? ", " : "") + std::to_string(entries[i]);
    TORCH_CHECK_VALUE(false, "order: expected each valid item's index once, best first, got ", came,
                      count > kShown ? ", …]" : "]", " at list ", r);
  }
  TORCH_CHECK(false, "order: expected not to change while it is read");
}

// Two numbers for each end of a chunk where lists may be longer than one.
at::Tensor empty_saved(const lists::Inputs& in) {
  const auto options = loss_options(in.scores);
  const auto chunks = [](const c10::SymInt& items) { return (items + (kChunk - 1)) / kChunk; };
  if (present(in.cu_seqlens)) {
    return at::empty_symint({in.scores.sym_numel() / kChunk + in.cu_seqlens->sym_size(0), 2}, options);
  }
  const c10::SymInt size = in.scores.sym_size(-1);
  if (size <= kChunk) return at::empty({0, 2}, options);
  c10::SymInt count = 1;
  for (const auto& lists : in.shape()) count = count * lists;
  return at::empty_symint({count * chunks(size), 2}, options);
}

struct Op {
  using Kernel = plackett_luce::Kernel;
  static constexpr auto launch_forward = &lists::launch_plackett_luce_forward;
  static constexpr auto launch_backward = &lists::launch_plackett_luce_backward;
  static constexpr auto raise_invalid = &raise_bad_order;
  static const auto& cpu() { return plackett_luce_kernels_cpu(); }
};

Tensors4 forward(const Inputs& in) {
  check(in);
  return lists::forward<Op>(in, empty_saved(in.lists));
}

at::Tensor backward(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& list_loss,
                    const at::Tensor& saved, const at::Tensor& denominator) {
  check(in);
  lists::check_backward(in.lists, grad_output, list_loss, denominator);
  const at::Tensor expected = empty_saved(in.lists);
  TORCH_CHECK_VALUE(saved.sym_sizes() == expected.sym_sizes() && saved.scalar_type() == expected.scalar_type() &&
                        saved.device() == in.lists.scores.device() && saved.is_contiguous(),
                    "saved: expected the tensor that forward returned");
  return lists::backward<Op>(in, grad_output, list_loss, saved, denominator);
}

#define RF_INPUTS                                                        \
  Inputs {                                                               \
    {scores,       cu_seqlens,       lengths,                            \
     mask,         weight,           normalizer,                         \
     weight_value, normalizer_value, static_cast<Reduction>(reduction)}, \
        order, top_k, position_weight, item_weight, top_k_value          \
  }

Tensors4 forward_kernel(const at::Tensor& scores, const OptionalTensor& order, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& lengths, const OptionalTensor& mask, const OptionalTensor& top_k,
                        const OptionalTensor& position_weight, const OptionalTensor& item_weight,
                        const OptionalTensor& weight, const OptionalTensor& normalizer, int64_t top_k_value,
                        double weight_value, double normalizer_value, int64_t reduction) {
  return forward(RF_INPUTS);
}

at::Tensor backward_kernel(const at::Tensor& grad_output, const at::Tensor& scores, const OptionalTensor& order,
                           const OptionalTensor& cu_seqlens, const OptionalTensor& lengths, const OptionalTensor& mask,
                           const OptionalTensor& top_k, const OptionalTensor& position_weight,
                           const OptionalTensor& item_weight, const OptionalTensor& weight,
                           const OptionalTensor& normalizer, const at::Tensor& list_loss, const at::Tensor& saved,
                           const at::Tensor& denominator, int64_t top_k_value, double weight_value,
                           double normalizer_value, int64_t reduction) {
  return backward(RF_INPUTS, grad_output, list_loss, saved, denominator);
}

class PlackettLuce : public torch::autograd::Function<PlackettLuce> {
 public:
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  static constexpr int kArguments = 14, kTensors = 10;

  static at::Tensor forward(Context* ctx, const at::Tensor& scores, const OptionalTensor& order,
                            const OptionalTensor& cu_seqlens, const OptionalTensor& lengths, const OptionalTensor& mask,
                            const OptionalTensor& top_k, const OptionalTensor& position_weight,
                            const OptionalTensor& item_weight, const OptionalTensor& weight,
                            const OptionalTensor& normalizer, int64_t top_k_value, double weight_value,
                            double normalizer_value, int64_t reduction) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_plackett_luce_loss_forward", "")
                               .typed<decltype(forward_kernel)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, list_loss, saved, denominator] =
        op.call(scores, order, cu_seqlens, lengths, mask, top_k, position_weight, item_weight, weight, normalizer,
                top_k_value, weight_value, normalizer_value, reduction);
    const auto keep = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
    ctx->save_for_backward({scores, keep(order), keep(cu_seqlens), keep(lengths), keep(mask), keep(top_k),
                            keep(position_weight), keep(item_weight), keep(weight), keep(normalizer),
                            none ? loss : list_loss, saved, denominator});
    ctx->saved_data["top_k_value"] = top_k_value;
    ctx->saved_data["weight_value"] = weight_value;
    ctx->saved_data["normalizer_value"] = normalizer_value;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static Variables backward(Context* ctx, Variables grad_outputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "plackett_luce_loss: a second derivative (create_graph=True) is not implemented");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_plackett_luce_loss_backward", "")
                               .typed<decltype(backward_kernel)>();
    const auto t = ctx->get_saved_variables();
    const auto optional = [&](int i) { return t[i].defined() ? OptionalTensor(t[i]) : std::nullopt; };
    at::AutoDispatchBelowADInplaceOrView guard;
    Variables gradients(kArguments);
    gradients[0] =
        op.call(grad_outputs[0], t[0], optional(1), optional(2), optional(3), optional(4), optional(5), optional(6),
                optional(7), optional(8), optional(9), t[kTensors], t[kTensors + 1], t[kTensors + 2],
                ctx->saved_data["top_k_value"].toInt(), ctx->saved_data["weight_value"].toDouble(),
                ctx->saved_data["normalizer_value"].toDouble(), ctx->saved_data["reduction"].toInt());
    return gradients;
  }
};

}  // namespace
}  // namespace rewardfuse::plackett_luce

namespace rewardfuse {

at::Tensor plackett_luce_loss(const at::Tensor& scores, const OptionalTensor& order, const OptionalTensor& cu_seqlens,
                              const OptionalTensor& lengths, const OptionalTensor& mask, const OptionalTensor& top_k,
                              const OptionalTensor& position_weight, const OptionalTensor& item_weight,
                              const OptionalTensor& weight, const OptionalTensor& normalizer, int64_t top_k_value,
                              double weight_value, double normalizer_value, int64_t reduction) {
  check_constant("position_weight", position_weight);
  check_constant("weight", weight);
  check_constant("normalizer", normalizer);
  return plackett_luce::PlackettLuce::apply(scores, order, cu_seqlens, lengths, mask, top_k, position_weight,
                                            item_weight, weight, normalizer, top_k_value, weight_value,
                                            normalizer_value, reduction);
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "plackett_luce_loss(Tensor scores, Tensor? order=None, Tensor? cu_seqlens=None, Tensor? lengths=None, "
      "Tensor? mask=None, Tensor? top_k=None, Tensor? position_weight=None, Tensor? item_weight=None, "
      "Tensor? weight=None, Tensor? normalizer=None, int top_k_value=0, float weight_value=1, "
      "float normalizer_value=0, int reduction=2) -> Tensor",
      &plackett_luce_loss);
  m.def(
      "_plackett_luce_loss_forward(Tensor scores, Tensor? order, Tensor? cu_seqlens, Tensor? lengths, Tensor? mask, "
      "Tensor? top_k, Tensor? position_weight, Tensor? item_weight, Tensor? weight, Tensor? normalizer, "
      "int top_k_value, float weight_value, float normalizer_value, int reduction) "
      "-> (Tensor loss, Tensor list_loss, Tensor saved, Tensor denominator)");
  m.def(
      "_plackett_luce_loss_backward(Tensor grad_output, Tensor scores, Tensor? order, Tensor? cu_seqlens, "
      "Tensor? lengths, Tensor? mask, Tensor? top_k, Tensor? position_weight, Tensor? item_weight, Tensor? weight, "
      "Tensor? normalizer, Tensor list_loss, Tensor saved, Tensor denominator, int top_k_value, float weight_value, "
      "float normalizer_value, int reduction) -> Tensor");
}

REWARDFUSE_REGISTER_LIST_OP("_plackett_luce_loss", plackett_luce::forward_kernel, plackett_luce::backward_kernel)

}  // namespace rewardfuse
