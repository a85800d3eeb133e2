#include "autograd/pairwise.h"

#include <ATen/ATen.h>

#include "autograd/pairwise_cuda.h"
#include "autograd/reduction.h"
#include "common/parallel.h"

namespace rewardfuse::pairwise {
namespace {

void check(const Names& names, const Inputs& in) {
  check_rewards(names.a, in.a);
  check_rewards(names.b, in.b);
  check_like(names.b, in.b, names.a, in.a);
  TORCH_CHECK_TYPE(in.a.scalar_type() == in.b.scalar_type(), names.b, ": expected the dtype of ", names.a, ", ",
                   dtype_name(in.a), ", got ", dtype_name(in.b));
  check_per_item(names.p, in.p, names.a, in.a);
  check_per_item(names.q, in.q, names.a, in.a);
  check_per_item("weight", in.weight, names.a, in.a);
  if (present(in.mask)) {
    TORCH_CHECK_TYPE(in.mask->scalar_type() == at::kBool, "mask: expected a tensor of torch.bool, got ",
                     dtype_name(*in.mask));
    check_like("mask", *in.mask, names.a, in.a);
  }
  check_reduction(in.reduction, in.normalizer, in.numbers[3], names.a, in.a);
}

void check_backward(const Names& names, const Inputs& in, const at::Tensor& grad_output,
                    const OptionalTensor& denominator, bool need_p) {
  TORCH_CHECK_VALUE(grad_output.dim() == 0 || in.reduction == Reduction::kNone,
                    "grad_output: expected a 0-d tensor, got shape ", grad_output.sym_sizes());
  check_per_item("grad_output", grad_output, names.a, in.a);
  TORCH_CHECK_VALUE(!need_p || present(in.p), names.p, ": no tensor was given, so it has no gradient");
  if (!in.counts()) return;
  TORCH_CHECK_VALUE(present(denominator) && denominator->dim() == 0 && denominator->scalar_type() == at::kDouble,
                    "denominator: expected the 0-d float64 tensor that forward returned");
  check_per_item("denominator", denominator, names.a, in.a);
}

at::Tensor empty_or_none(const at::Tensor& like, bool wanted) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty({0}, like.options());
}

void describe(const Inputs& in, Problem& problem, PlaneLayout& layout) {
  problem.dtype = *kernel_dtype(in.a.scalar_type());
  layout.add(problem.a, in.a);
  layout.add(problem.b, in.b);
  layout.add(problem.p, in.p, in.numbers[0]);
  layout.add(problem.weight, in.weight, in.numbers[1]);
  layout.add(problem.q, in.q, in.numbers[2]);
  layout.add(problem.mask, in.mask, 1);
  std::copy(in.options().begin(), in.options().end(), problem.options);
}

}  // namespace

void check_public(const Names& names, const Inputs& in) {
  check_constant("weight", in.weight);
  check_constant(names.q, in.q);
  check_constant("normalizer", in.normalizer);
}

Selected::Selected(const Inputs& in) {
  const auto type = loss_options(in.a).dtype();
  const auto value = [&](const OptionalTensor& t, double number) {
    return present(t) ? t->to(type) : at::scalar_tensor(number, loss_options(in.a));
  };
  weight = value(in.weight, in.numbers[1]);
  counted = (weight != 0).expand_as(in.a);
  if (present(in.mask)) counted = counted.logical_and(*in.mask);
  const auto select = [&](const at::Tensor& t) { return at::where(counted, t, at::zeros({}, t.options())); };
  a = select(in.a.to(type));
  b = select(in.b.to(type));
  p = select(value(in.p, in.numbers[0]));
  q = select(value(in.q, in.numbers[2]));
  weight = select(weight);
}

at::Tensor Selected::scale(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& denominator) const {
  at::Tensor scale = at::where(counted, grad_output, at::zeros({}, grad_output.options())) * weight;
  if (in.reduction != Reduction::kMean) return scale;
  if (present(in.normalizer)) return scale / *in.normalizer;
  if (in.has_normalizer()) return scale / in.numbers[3];
  return in.counts() ? scale / denominator.clamp_min(1).to(scale.dtype()) : scale / std::max<int64_t>(in.a.numel(), 1);
}

at::Tensor Selected::gradient_like(const at::Tensor& input, const at::Tensor& gradient) {
  return gradient.sum_to_size(input.sizes()).to(input.dtype());
}

Tensors3 forward(const Names& names, const Kernels& kernels, const Inputs& in, bool return_stats,
                 void (*raise_invalid)(const Inputs&)) {
  check(names, in);
  const auto options = loss_options(in.a);
  const auto counts = options.dtype(at::kDouble);
  const bool per_item = in.reduction == Reduction::kNone;
  at::Tensor loss = per_item ? at::empty_symint(in.a.sym_sizes(), options) : at::empty({}, options);
  at::Tensor stats = at::empty({return_stats ? 5 : 0}, options);
  at::Tensor denominator = in.counts() ? at::empty({}, counts) : at::empty({0}, counts);
  if (in.a.is_meta()) return {loss, stats, denominator};

  Problem problem;
  PlaneLayout layout(in.a.sizes());
  describe(in, problem, layout);
  problem.plane = layout.lay();
  problem.wants_stats = return_stats;
  if (in.a.is_cuda()) {
    launch_forward(kernels.cuda, in, problem, loss, stats, denominator);
    return {loss, stats, denominator};
  }
  void* items = per_item ? loss.mutable_data_ptr() : nullptr;
  const Totals totals = sum_over_ranges<Totals>(problem.plane.items, [&](int64_t begin, int64_t end, Totals& range) {
    kernels.cpu.forward(problem, begin, end, items, range);
  });
  if (totals.invalid > 0) raise_invalid(in);
  if (in.reduction == Reduction::kSum) write_numbers(loss, {totals.loss});
  if (in.reduction == Reduction::kMean) {
    write_numbers(loss, {mean_or_zero(totals.loss, in.has_normalizer() ? cpu_normalizer(in.normalizer, in.numbers[3])
                                                                       : totals.valid)});
  }
  if (return_stats) {
    const double n = totals.counted;
    write_numbers(stats, {mean_or_zero(totals.correct, n), mean_or_zero(totals.ties, n),
                          mean_or_zero(totals.a - totals.b, n), mean_or_zero(totals.a, n), mean_or_zero(totals.b, n)});
  }
  if (in.counts()) write_numbers(denominator, {totals.valid});
  return {loss, stats, denominator};
}

Tensors3 backward(const Names& names, const Kernels& kernels, const Inputs& in, const at::Tensor& grad_output,
                  const OptionalTensor& denominator, std::array<bool, 3> needs) {
  check(names, in);
  check_backward(names, in, grad_output, denominator, needs[2]);
  at::Tensor grad_a = empty_or_none(in.a, needs[0]), grad_b = empty_or_none(in.b, needs[1]);
  at::Tensor grad_p = empty_or_none(present(in.p) ? *in.p : in.a, needs[2]);
  if (in.a.is_meta()) return {grad_a, grad_b, grad_p};

  Problem problem;
  Gradients out;
  PlaneLayout layout(in.a.sizes());
  describe(in, problem, layout);
  layout.add(out.grad_output, grad_output);
  problem.plane = layout.lay();
  if (needs[0]) out.a = grad_a.mutable_data_ptr();
  if (needs[1]) out.b = grad_b.mutable_data_ptr();
  if (needs[2]) {
    out.sum_p = in.p->dim() == 0;
    (out.sum_p ? out.p_total : out.p) = grad_p.mutable_data_ptr();
    out.p_dtype = *kernel_dtype(in.p->scalar_type());
  }
  if (in.reduction == Reduction::kMean && !in.counts() && !in.has_normalizer())
    out.scale = mean_or_zero(1, problem.plane.items);
  if (in.a.is_cuda()) {
    launch_backward(kernels.cuda, in, problem, out, denominator);
    return {grad_a, grad_b, grad_p};
  }
  if (in.counts()) out.scale = mean_or_zero(1, *denominator->const_data_ptr<double>());
  if (in.has_normalizer()) out.scale = 1 / cpu_normalizer(in.normalizer, in.numbers[3]);
  const Totals totals = sum_over_ranges<Totals>(problem.plane.items, [&](int64_t begin, int64_t end, Totals& range) {
    kernels.cpu.backward(problem, out, begin, end, range);
  });
  if (out.sum_p) grad_p.fill_(totals.grad_p);
  return {grad_a, grad_b, grad_p};
}

}  // namespace rewardfuse::pairwise

namespace rewardfuse {

void check_values(const char* name, const OptionalTensor& values, const pairwise::Inputs& in, const char* expected,
                  const at::Tensor& good) {
  if (!present(values)) return;
  const at::Tensor bad =
      good.logical_not().expand_as(in.a).logical_and(pairwise::Selected(in).counted).flatten().nonzero();
  if (bad.numel() == 0) return;
  const int64_t index = bad[0].item().toLong();
  TORCH_CHECK_VALUE(false, name, ": expected ", expected, ", got ",
                    values->expand_as(in.a).flatten()[index].item().toDouble(), " at index ", index);
}

}  // namespace rewardfuse
