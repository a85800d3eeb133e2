#include "autograd/lists.h"

namespace rewardfuse::lists {
namespace {

bool is_integer(const at::Tensor& t) {
  return at::isIntegralType(t.scalar_type(), /*includeBool=*/false) && dtype_is_real(t.scalar_type());
}

void check_device(const char* name, const at::Tensor& t, const at::Tensor& scores) {
  TORCH_CHECK_VALUE(t.device() == scores.device(), name, ": expected the device of scores, ", scores.device(), ", got ",
                    t.device());
}

void check_lengths(const Lists& lists) {
  for (int64_t r = 0; lists.lengths && r < lists.count; ++r) {
    TORCH_CHECK_VALUE(lists.lengths[r] >= 0 && lists.lengths[r] <= lists.size, "lengths: expected from 0 to ",
                      lists.size, ", got ", lists.lengths[r], " at list ", r);
  }
}

// Returns the longest list.
int64_t check_bounds(const Lists& lists) {
  const int64_t* const bound = lists.cu_seqlens;
  TORCH_CHECK_VALUE(bound[0] == 0, "cu_seqlens: expected to start at 0, got ", bound[0]);
  int64_t longest = 0;
  for (int64_t r = 0; r < lists.count; ++r) {
    TORCH_CHECK_VALUE(bound[r] <= bound[r + 1], "cu_seqlens: expected not to decrease, got ", bound[r + 1], " at ",
                      r + 1);
    longest = std::max(longest, bound[r + 1] - bound[r]);
  }
  TORCH_CHECK_VALUE(bound[lists.count] == lists.size, "cu_seqlens: expected to end at the number of scores, ",
                    lists.size, ", got ", bound[lists.count]);
  return longest;
}

}  // namespace

std::vector<c10::SymInt> Inputs::shape() const {
  if (present(cu_seqlens)) return {cu_seqlens->sym_size(0) - 1};
  const auto sizes = scores.sym_sizes();
  return {sizes.begin(), sizes.end() - 1};
}

void check_integers(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(is_integer(t), name, ": expected a tensor of an integer dtype, got ", dtype_name(t));
}

void check_per_list(const char* name, const OptionalTensor& t, const Inputs& in, bool scalar) {
  if (!present(t)) return;
  const auto shape = in.shape();
  TORCH_CHECK_VALUE(t->sym_sizes() == c10::SymIntArrayRef(shape) || (scalar && t->dim() == 0), name, ": expected ",
                    scalar ? "a number, a 0-d tensor or one value a list" : "one value a list", ", ",
                    c10::SymIntArrayRef(shape), ", got ", t->sym_sizes());
  check_device(name, *t, in.scores);
}

void check_by_position(const char* name, const OptionalTensor& t, const at::Tensor& scores) {
  if (!present(t)) return;
  TORCH_CHECK_TYPE(dtype_is_real(t->scalar_type()), name, ": expected a tensor of a real dtype, got ", dtype_name(*t));
  const auto sizes = scores.sym_sizes();
  TORCH_CHECK_VALUE(t->sym_sizes() == sizes || t->sym_sizes() == sizes.slice(sizes.size() - 1), name,
                    ": expected one value a position, ", sizes.slice(sizes.size() - 1), ", or the shape of scores, ",
                    sizes, ", got ", t->sym_sizes());
  check_device(name, *t, scores);
}

void check_items(const Inputs& in) {
  check_rewards("scores", in.scores);
  if (present(in.cu_seqlens)) {
    TORCH_CHECK_VALUE(in.scores.dim() == 1, "scores: expected packed lists, [total], got shape ",
                      in.scores.sym_sizes());
    check_integers("cu_seqlens", *in.cu_seqlens);
    TORCH_CHECK_VALUE(in.cu_seqlens->dim() == 1 && in.cu_seqlens->sym_size(0) > 0,
                      "cu_seqlens: expected [lists + 1] bounds, got shape ", in.cu_seqlens->sym_sizes());
    check_device("cu_seqlens", *in.cu_seqlens, in.scores);
    TORCH_CHECK_VALUE(!present(in.lengths) && !present(in.mask), "cu_seqlens: expected without lengths and mask");
  }
  TORCH_CHECK_VALUE(in.scores.dim() > 0, "scores: expected a tensor [*, N], got a 0-d tensor");
  TORCH_CHECK_VALUE(!present(in.lengths) || !present(in.mask), "lengths: expected without mask, which says the same");
  if (present(in.lengths)) {
    check_integers("lengths", *in.lengths);
    check_per_list("lengths", in.lengths, in, false);
  }
  if (present(in.mask)) {
    TORCH_CHECK_TYPE(in.mask->scalar_type() == at::kBool, "mask: expected a tensor of torch.bool, got ",
                     dtype_name(*in.mask));
    check_like("mask", *in.mask, "scores", in.scores);
  }
}

void check_weight(const Inputs& in) {
  TORCH_CHECK_TYPE(!present(in.weight) || dtype_is_real(in.weight->scalar_type()),
                   "weight: expected a tensor of a real dtype, got ", dtype_name(*in.weight));
  check_per_list("weight", in.weight, in, true);
}

void check_backward(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& list_loss,
                    const at::Tensor& denominator) {
  const auto shape = in.shape();
  const bool none = in.reduction == Reduction::kNone;
  TORCH_CHECK_VALUE(grad_output.dim() == 0 || none, "grad_output: expected a 0-d tensor, got shape ",
                    grad_output.sym_sizes());
  check_per_list("grad_output", grad_output, in, true);
  TORCH_CHECK_TYPE(dtype_is_real(grad_output.scalar_type()), "grad_output: expected a tensor of a real dtype, got ",
                   dtype_name(grad_output));
  c10::SymInt count = 1;
  for (const auto& size : shape) count = count * size;
  TORCH_CHECK_VALUE(list_loss.sym_numel() == count && list_loss.scalar_type() == loss_options(in.scores).dtype(),
                    "list_loss: expected the lists' losses that forward returned");
  check_device("list_loss", list_loss, in.scores);
  if (!in.counts()) return;
  TORCH_CHECK_VALUE(denominator.dim() == 0 && denominator.scalar_type() == at::kDouble,
                    "denominator: expected the 0-d float64 tensor that forward returned");
  check_device("denominator", denominator, in.scores);
}

View::View(const Inputs& in) {
  const auto& scores = in.scores;
  lists.dtype = *kernel_dtype(scores.scalar_type());
  if (present(in.cu_seqlens)) {
    lists.count = in.cu_seqlens->size(0) - 1;
    lists.size = scores.size(0);
    lists.cu_seqlens = integers(*in.cu_seqlens);
    if (scores.is_cpu()) lists.longest = check_bounds(lists);
  } else {
    lists.size = lists.longest = scores.size(-1);
    lists.count = lists.size > 0 ? scores.numel() / lists.size
                                 : c10::multiply_integers(scores.sizes().slice(0, scores.dim() - 1));
    if (present(in.lengths)) lists.lengths = integers(*in.lengths);
    if (scores.is_cpu()) check_lengths(lists);
  }
  per_item(lists.scores, scores);
  lists.mask.value = 1;
  lists.weight.value = in.weight_value;
  if (present(in.mask)) per_item(lists.mask, *in.mask);
  if (present(in.mask) && scores.is_cuda()) lists.lengths = integers(in.mask->sum(-1));
  if (present(in.weight)) per_list(lists.weight, *in.weight);
}

void View::per_item(Operand& operand, const at::Tensor& t) {
  operand.dtype = *kernel_dtype(t.scalar_type());
  if (t.dim() == 1) {
    kept_.push_back(t);
    operand.inner_stride = t.stride(0);
  } else {
    kept_.push_back(t.reshape({lists.count, lists.size}));
    operand.outer_stride = kept_.back().stride(0);
    operand.inner_stride = kept_.back().stride(1);
  }
  operand.data = kept_.back().const_data_ptr();
}

void View::per_list(Operand& operand, const at::Tensor& t) {
  operand.dtype = *kernel_dtype(t.scalar_type());
  kept_.push_back(t.dim() == 0 ? t : t.reshape({lists.count}));
  if (t.dim() > 0) operand.outer_stride = kept_.back().stride(0);
  operand.data = kept_.back().const_data_ptr();
}

const int64_t* View::integers(const at::Tensor& t) {
  kept_.push_back(t.to(at::kLong).contiguous());
  return kept_.back().const_data_ptr<int64_t>();
}

Results::Results(const Inputs& in) {
  const auto options = loss_options(in.scores);
  const auto shape = in.shape();
  if (in.reduction == Reduction::kNone) {
    loss = at::empty_symint(shape, options);
    list_loss = at::empty({0}, options);
  } else {
    loss = at::empty({}, options);
    c10::SymInt count = 1;
    for (const auto& size : shape) count = count * size;
    list_loss = at::empty_symint({count}, options);
  }
  denominator = at::empty(in.counts() ? at::IntArrayRef() : at::IntArrayRef({0}), options.dtype(at::kDouble));
}

void Results::write(const Inputs& in, const Totals& totals) const {
  if (in.reduction == Reduction::kSum) write_numbers(loss, {totals.loss});
  if (in.reduction == Reduction::kMean) {
    const double divisor = in.counts() ? totals.valid : cpu_normalizer(in.normalizer, in.normalizer_value);
    write_numbers(loss, {mean_or_zero(totals.loss, divisor)});
  }
  if (in.counts()) write_numbers(denominator, {totals.valid});
}

CudaForward Results::cuda(const Inputs& in, void* saved) const {
  CudaForward out;
  out.reduction = in.reduction;
  out.loss = loss.mutable_data_ptr();
  out.list_loss = list_losses(in);
  out.saved = saved;
  if (in.counts()) out.denominator = denominator.mutable_data_ptr<double>();
  out.normalizer = normalizer_operand(in.normalizer, in.normalizer_value);
  return out;
}

void set_scale(Gradients& out, const Inputs& in, const at::Tensor& list_loss, const at::Tensor& denominator) {
  if (in.scores.is_cuda()) {
    if (in.counts()) out.denominator = denominator.const_data_ptr<double>();
    out.normalizer = normalizer_operand(in.normalizer, in.normalizer_value);
    out.list_loss = list_loss.const_data_ptr();
  } else if (in.counts()) {
    out.scale = mean_or_zero(1, *denominator.const_data_ptr<double>());
  } else if (in.reduction == Reduction::kMean) {
    out.scale = 1 / cpu_normalizer(in.normalizer, in.normalizer_value);
  }
}

}  // namespace rewardfuse::lists
