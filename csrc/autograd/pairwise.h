// What the ops on pairs share on torch's side: checks, allocation, launch, and the autograd function.
//
// An op is a struct Op with
//   names, forward_op, backward_op      argument names for messages; names of its private dispatcher ops
//   kernels(options)                    the kernels of the model that the options choose
//   raise_invalid(inputs)               finds and names the first value out of range (slow; only on the way to an
//   error) differentiable_backward(…)          the backward in ATen ops, taken under create_graph=True
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <tuple>

#include "autograd/reduction.h"
#include "common/check.h"
#include "pairwise/kernels.h"

namespace rewardfuse::pairwise {

struct Names {
  const char *a, *b, *p, *q;
};

// The number that stands for p, weight, q where there is no tensor, the normalizer (0: none), and the model's options.
using Numbers = std::array<double, 4 + kOptions>;

struct Inputs {
  const at::Tensor& a;               // [*] rewards
  const at::Tensor& b;               // [*]
  const OptionalTensor& p;           // [*] or [], may want a gradient
  const OptionalTensor& mask;        // [*] bool
  const OptionalTensor& weight;      // [*] or []
  const OptionalTensor& q;           // [*] or []
  const OptionalTensor& normalizer;  // []
  at::ArrayRef<double> numbers;      // as Numbers
  Reduction reduction;

  at::ArrayRef<double> options() const {
    TORCH_CHECK_VALUE(numbers.size() > 6 && numbers.size() <= Numbers{}.size(), "numbers: expected 7 to ",
                      Numbers{}.size(), " of them, got ", numbers.size());
    return numbers.slice(4);
  }
  bool has_normalizer() const { return rewardfuse::has_normalizer(normalizer, numbers[3]); }
  // The mean's denominator is known only to the kernel that reads the mask.
  bool counts() const { return reduction == Reduction::kMean && present(mask) && !has_normalizer(); }
};

struct Kernels {
  const PairKernelsCpu& cpu;
  const PairKernelsCuda* cuda;  // null where the build has none
};
#if REWARDFUSE_WITH_CUDA
#define RF_PAIR_KERNELS(name) \
  ::rewardfuse::pairwise::Kernels { name##_cpu(), &::rewardfuse::cuda::name }
#else
#define RF_PAIR_KERNELS(name) \
  ::rewardfuse::pairwise::Kernels { name##_cpu(), nullptr }
#endif

using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using ForwardOp = Tensors3(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& p,
                           const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& q,
                           const OptionalTensor& normalizer, at::ArrayRef<double> numbers, int64_t reduction,
                           bool return_stats);
using BackwardOp = Tensors3(const at::Tensor& grad_output, const at::Tensor& a, const at::Tensor& b,
                            const OptionalTensor& p, const OptionalTensor& mask, const OptionalTensor& weight,
                            const OptionalTensor& q, const OptionalTensor& normalizer,
                            const OptionalTensor& denominator, at::ArrayRef<double> numbers, int64_t reduction,
                            bool need_a, bool need_b, bool need_p);

// What the public ops check before autograd hides who wants a gradient.
void check_public(const Names& names, const Inputs& in);

// A pair's values in the accumulation type with 0 (weight 1) where nothing counts, for differentiable_backward.
struct Selected {
  explicit Selected(const Inputs& in);
  at::Tensor a, b, p, q, weight;  // [*] or []
  at::Tensor counted;             // [*] bool

  // d(loss)/d(pair): grad_output · weight / denominator, 0 where nothing counts.
  at::Tensor scale(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& denominator) const;
  // `gradient` [*] in the dtype and shape of an input, which may be 0-d.
  static at::Tensor gradient_like(const at::Tensor& input, const at::Tensor& gradient);
};

// (loss, stats [5] or [0], denominator [] or [0]); `raise_invalid` is called where a CPU kernel met a bad value.
Tensors3 forward(const Names& names, const Kernels& kernels, const Inputs& in, bool return_stats,
                 void (*raise_invalid)(const Inputs&));
// Gradients of a, b, p; size 0 where not needed.
Tensors3 backward(const Names& names, const Kernels& kernels, const Inputs& in, const at::Tensor& grad_output,
                  const OptionalTensor& denominator, std::array<bool, 3> needs);

template <class Op>
Tensors3 forward_kernel(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& p, const OptionalTensor& mask,
                        const OptionalTensor& weight, const OptionalTensor& q, const OptionalTensor& normalizer,
                        at::ArrayRef<double> numbers, int64_t reduction, bool return_stats) {
  const Inputs in{a, b, p, mask, weight, q, normalizer, numbers, static_cast<Reduction>(reduction)};
  return forward(Op::names, Op::kernels(in.options()), in, return_stats, &Op::raise_invalid);
}

template <class Op>
Tensors3 backward_kernel(const at::Tensor& grad_output, const at::Tensor& a, const at::Tensor& b,
                         const OptionalTensor& p, const OptionalTensor& mask, const OptionalTensor& weight,
                         const OptionalTensor& q, const OptionalTensor& normalizer, const OptionalTensor& denominator,
                         at::ArrayRef<double> numbers, int64_t reduction, bool need_a, bool need_b, bool need_p) {
  const Inputs in{a, b, p, mask, weight, q, normalizer, numbers, static_cast<Reduction>(reduction)};
  return backward(Op::names, Op::kernels(in.options()), in, grad_output, denominator, {need_a, need_b, need_p});
}

template <class Op>
class PairLoss : public torch::autograd::Function<PairLoss<Op>> {
 public:
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, const at::Tensor& a, const at::Tensor& b, const OptionalTensor& p,
                           const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& q,
                           const OptionalTensor& normalizer, const Numbers& numbers, int64_t reduction,
                           bool return_stats) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::forward_op, "").template typed<ForwardOp>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, stats, denominator] = op.call(a, b, p, mask, weight, q, normalizer, numbers, reduction, return_stats);
    const auto keep = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({a, b, keep(p), keep(mask), keep(weight), keep(q), keep(normalizer), denominator});
    ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
    ctx->saved_data["reduction"] = reduction;
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static Variables backward(Context* ctx, Variables grad_outputs) {
    constexpr int kArguments = 10;
    Variables gradients(kArguments);
    if (!grad_outputs[0].defined()) return gradients;
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](int i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor p = optional(2), mask = optional(3), weight = optional(4), q = optional(5),
                         normalizer = optional(6);
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const bool need_a = ctx->needs_input_grad(0), need_b = ctx->needs_input_grad(1);
    const bool need_p = p.has_value() && ctx->needs_input_grad(2);

    if (at::GradMode::is_enabled()) {
      const Inputs in{saved[0], saved[1], p, mask, weight, q, normalizer, numbers, static_cast<Reduction>(reduction)};
      std::tie(gradients[0], gradients[1], gradients[2]) = Op::differentiable_backward(in, grad_outputs[0], saved[7]);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow(Op::backward_op, "").template typed<BackwardOp>();
      std::tie(gradients[0], gradients[1], gradients[2]) =
          op.call(grad_outputs[0], saved[0], saved[1], p, mask, weight, q, normalizer, saved[7], numbers, reduction,
                  need_a, need_b, need_p);
    }
    if (!need_a) gradients[0] = at::Tensor();
    if (!need_b) gradients[1] = at::Tensor();
    if (!need_p) gradients[2] = at::Tensor();
    return gradients;
  }
};

}  // namespace rewardfuse::pairwise

namespace rewardfuse {

// Raises for the first counted pair where `good` is false; nothing where there is none.
void check_values(const char* name, const OptionalTensor& values, const pairwise::Inputs& in, const char* expected,
                  const at::Tensor& good);

}  // namespace rewardfuse

// The CUDA key is registered in every build: without CUDA kernels it says so by name.
#define REWARDFUSE_REGISTER_PAIR_OP(Op, forward_name, backward_name) \
  TORCH_LIBRARY_IMPL(rewardfuse, CPU, m) {                           \
    m.impl(forward_name, &pairwise::forward_kernel<Op>);             \
    m.impl(backward_name, &pairwise::backward_kernel<Op>);           \
  }                                                                  \
  TORCH_LIBRARY_IMPL(rewardfuse, CUDA, m) {                          \
    m.impl(forward_name, &pairwise::forward_kernel<Op>);             \
    m.impl(backward_name, &pairwise::backward_kernel<Op>);           \
  }                                                                  \
  TORCH_LIBRARY_IMPL(rewardfuse, Meta, m) {                          \
    m.impl(forward_name, &pairwise::forward_kernel<Op>);             \
    m.impl(backward_name, &pairwise::backward_kernel<Op>);           \
  }
