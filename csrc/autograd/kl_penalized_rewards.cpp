// rewardfuse::kl_penalized_rewards; the maths is in kernels/kl_penalized_rewards/math.h.
#include "kl_penalized_rewards/args.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <iterator>

#include "autograd/kl_options.h"
#include "autograd/kl_penalized_rewards_cuda.h"
#include "autograd/ops.h"
#include "autograd/reduction.h"
#include "common/parallel.h"

namespace rewardfuse::kl_rewards {
namespace {

using Tensors2 = std::tuple<at::Tensor, at::Tensor>;

// The options of a call as its private ops take them: one list, so that a call has few arguments to hand around.
enum Number {
  kKlCoef,
  kPenalty,
  kScoreLow,
  kScoreHigh,
  kEstimator,
  kGradientEstimator,
  kInputLow,
  kInputHigh,
  kOutputLow,
  kOutputHigh,
  kOnePast,
  kReplace,
  kNumbers
};
using Numbers = std::array<double, kNumbers>;

struct Inputs {
  const at::Tensor& logprobs;      // [*, T]
  const at::Tensor& ref_logprobs;  // [*, T]
  const OptionalTensor& mask;      // [*, T] bool
  const OptionalTensor& scores;    // [*] or [*, T]
  const OptionalTensor& ended;     // [*] bool
  const OptionalTensor& kl_coef;   // []
  at::ArrayRef<double> numbers;    // as Number says

  c10::SymIntArrayRef shape() const { return logprobs.sym_sizes().slice(0, logprobs.dim() - 1); }
  bool token_scores() const { return present(scores) && scores->dim() == logprobs.dim(); }
};

void check_scores(const Inputs& in) {
  if (!present(in.scores)) return;
  check_rewards("scores", *in.scores);
  const auto sizes = in.scores->sym_sizes();
  TORCH_CHECK_VALUE(sizes == in.shape() || sizes == in.logprobs.sym_sizes(), "scores: expected one a sequence, ",
                    in.shape(), ", or one a token, ", in.logprobs.sym_sizes(), ", got ", sizes);
  check_device("scores", *in.scores, "logprobs", in.logprobs);
  TORCH_CHECK_VALUE(in.numbers[kOnePast] == 0 || !in.token_scores(), "terminal: expected \"last\" with scores a token");
}

void check_ended(const Inputs& in) {
  if (!present(in.ended)) return;
  TORCH_CHECK_TYPE(in.ended->scalar_type() == at::kBool, "ended: expected a tensor of torch.bool, got ",
                   dtype_name(*in.ended));
  TORCH_CHECK_VALUE(in.ended->sym_sizes() == in.shape(), "ended: expected one a sequence, ", in.shape(), ", got ",
                    in.ended->sym_sizes());
  check_device("ended", *in.ended, "logprobs", in.logprobs);
}

void check_coefficient(double value) {
  check_number("kl_coef", value >= 0 && std::isfinite(value), "finite and not negative", value);
}

void check_numbers(at::ArrayRef<double> numbers) {
  check_coefficient(numbers[kKlCoef]);
  check_estimators(static_cast<int64_t>(numbers[kEstimator]), static_cast<int64_t>(numbers[kGradientEstimator]));
  check_clamp("input_clamp", numbers[kInputLow], numbers[kInputHigh]);
  check_clamp("output_clamp", numbers[kOutputLow], numbers[kOutputHigh]);
  check_clamp("score_clip", numbers[kScoreLow], numbers[kScoreHigh]);
  const double penalty = numbers[kPenalty];
  check_number("missing_eos_penalty", penalty >= 0 && std::isfinite(penalty), "finite and not negative", penalty);
}

void check(const Inputs& in) {
  TORCH_CHECK_VALUE(in.numbers.size() == kNumbers, "numbers: expected ", static_cast<int>(kNumbers), " of them, got ",
                    in.numbers.size());
  check_rewards("logprobs", in.logprobs);
  TORCH_CHECK_VALUE(in.logprobs.dim() > 0, "logprobs: expected a tensor [*, T], got a 0-d tensor");
  check_like("ref_logprobs", in.ref_logprobs, "logprobs", in.logprobs);
  TORCH_CHECK_TYPE(in.ref_logprobs.scalar_type() == in.logprobs.scalar_type(),
                   "ref_logprobs: expected the dtype of logprobs, ", dtype_name(in.logprobs), ", got ",
                   dtype_name(in.ref_logprobs));
  if (present(in.mask)) {
    TORCH_CHECK_TYPE(in.mask->scalar_type() == at::kBool, "mask: expected a tensor of torch.bool, got ",
                     dtype_name(*in.mask));
    check_like("mask", *in.mask, "logprobs", in.logprobs);
  }
  check_scores(in);
  check_ended(in);
  if (present(in.kl_coef)) {
    TORCH_CHECK_VALUE(in.kl_coef->dim() == 0, "kl_coef: expected a number or a 0-d tensor, got shape ",
                      in.kl_coef->sym_sizes());
    check_per_item("kl_coef", in.kl_coef, "logprobs", in.logprobs);
  }
  check_numbers(in.numbers);
}

// The tensors as a kernel sees them; keeps what had to be copied.
class View {
 public:
  explicit View(const Inputs& in) {
    const auto& logprobs = in.logprobs;
    problem.size = logprobs.size(-1);
    problem.rows = c10::multiply_integers(logprobs.sizes().slice(0, logprobs.dim() - 1));
    problem.dtype = *kernel_dtype(logprobs.scalar_type());
    per_token(problem.logprobs, logprobs);
    per_token(problem.ref_logprobs, in.ref_logprobs);
    if (present(in.mask)) per_token(problem.mask, *in.mask);
    problem.token_scores = in.token_scores();
    if (present(in.scores))
      problem.token_scores ? per_token(problem.scores, *in.scores) : per_row(problem.scores, *in.scores);
    if (present(in.ended)) per_row(problem.ended, *in.ended);
    problem.kl_coef.value = in.numbers[kKlCoef];
    if (present(in.kl_coef)) per_row(problem.kl_coef, *in.kl_coef);
    if (present(in.kl_coef) && logprobs.is_cpu()) check_coefficient(in.kl_coef->item().toDouble());
    problem.missing_eos_penalty = in.numbers[kPenalty];
    problem.score_low = in.numbers[kScoreLow];
    problem.score_high = in.numbers[kScoreHigh];
    std::copy_n(in.numbers.begin() + kEstimator, std::size(problem.options), problem.options);
    problem.one_past = in.numbers[kOnePast] != 0;
    problem.replace = in.numbers[kReplace] != 0;
  }

  void per_token(Operand& operand, const at::Tensor& t) {
    const at::Tensor rows = lay(operand, t, t.dim() - 1);
    operand.inner_stride = rows.stride(-1);
  }
  void per_row(Operand& operand, const at::Tensor& t) { lay(operand, t, t.dim()); }

  Problem problem;

 private:
  // Finds the one stride of the first `dims` dimensions, in a copy where they have more.
  at::Tensor lay(Operand& operand, const at::Tensor& t, int64_t dims) {
    int64_t stride = 0, span = -1;
    for (int64_t d = t.numel() > 0 ? dims - 1 : -1; d >= 0; --d) {
      if (t.size(d) == 1) continue;
      if (span >= 0 && t.stride(d) != span) {
        copies_.push_back(t.contiguous());
        return lay(operand, copies_.back(), dims);
      }
      if (span < 0) stride = t.stride(d);
      span = t.stride(d) * t.size(d);
    }
    operand.data = t.const_data_ptr();
    operand.dtype = *kernel_dtype(t.scalar_type());
    operand.outer_stride = stride;
    return t;
  }

  std::deque<at::Tensor> copies_;
};

// Rows a range: about so many tokens, and no more ranges than kMostRanges.
int64_t rows_a_range(const Problem& problem) {
  constexpr int64_t kTokens = 8192;
  const int64_t size = std::max<int64_t>(problem.size, 1);
  return std::max<int64_t>({kTokens / size, (problem.rows + kMostRanges - 1) / kMostRanges, 1});
}

void write_stats(const at::Tensor& stats, const Totals& totals) {
  const double rows = totals.rows;
  write_numbers(stats, {mean_or_zero(totals.kl, totals.tokens), mean_or_zero(totals.kl, rows),
                        mean_or_zero(totals.score, rows), mean_or_zero(totals.reward, rows), totals.tokens, rows});
}

Tensors5 forward(const Inputs& in) {
  check(in);
  const auto options = loss_options(in.logprobs);
  const auto tokens = in.logprobs.sym_sizes(), sequences = in.shape();
  Tensors5 out{at::empty_symint(tokens, options), at::empty_symint(tokens, options),
               at::empty_symint(sequences, options), at::empty_symint(sequences, options),
               at::empty({kStats}, options)};
  if (in.logprobs.is_meta()) return out;
  const auto& [rewards, kl, sequence_kl, sequence_reward, stats] = out;
  const View view(in);
  const Problem& problem = view.problem;
  const Results results{rewards.mutable_data_ptr(), kl.mutable_data_ptr(), sequence_kl.mutable_data_ptr(),
                        sequence_reward.mutable_data_ptr(), stats.mutable_data_ptr()};
  if (in.logprobs.is_cuda()) {
    launch_forward(problem, results, in.logprobs);
    return out;
  }
  const auto& cpu = kl_penalized_rewards_kernels_cpu();
  const int64_t length = rows_a_range(problem);
  const auto bound = [&](int64_t i) { return std::min(problem.rows, i * length); };
  write_stats(stats, sum_over_bounds<Totals>((problem.rows + length - 1) / length, bound,
                                             [&](int64_t begin, int64_t end, Totals& totals) {
                                               cpu.forward(problem, results, begin, end, totals);
                                             }));
  return out;
}

struct GradOutputs {
  const OptionalTensor& rewards;          // [*, T]
  const OptionalTensor& kl;               // [*, T]
  const OptionalTensor& sequence_kl;      // [*]
  const OptionalTensor& sequence_reward;  // [*]
};

void check_grad(const char* name, const OptionalTensor& grad, c10::SymIntArrayRef shape, const Inputs& in) {
  if (!present(grad)) return;
  TORCH_CHECK_VALUE(grad->sym_sizes() == shape, name, ": expected the shape ", shape, ", got ", grad->sym_sizes());
  TORCH_CHECK_TYPE(grad->scalar_type() == loss_options(in.logprobs).dtype(), name, ": expected a tensor of ",
                   loss_options(in.logprobs).dtype(), ", got ", dtype_name(*grad));
  check_device(name, *grad, "logprobs", in.logprobs);
}

// Gradients of logprobs and scores; size 0 where not needed.
Tensors2 backward(const Inputs& in, const GradOutputs& grad, bool need_logprobs, bool need_scores) {
  check(in);
  check_grad("grad_rewards", grad.rewards, in.logprobs.sym_sizes(), in);
  check_grad("grad_kl", grad.kl, in.logprobs.sym_sizes(), in);
  check_grad("grad_sequence_kl", grad.sequence_kl, in.shape(), in);
  check_grad("grad_sequence_reward", grad.sequence_reward, in.shape(), in);
  TORCH_CHECK_VALUE(!need_scores || present(in.scores), "scores: no tensor was given, so it has no gradient");
  const auto empty = [](const at::Tensor& like, bool wanted) {
    if (!wanted) return at::empty({0}, like.options());
    return at::empty_symint(like.sym_sizes(), like.options(), at::MemoryFormat::Contiguous);
  };
  const Tensors2 out{empty(in.logprobs, need_logprobs), empty(need_scores ? *in.scores : in.logprobs, need_scores)};
  if (in.logprobs.is_meta()) return out;
  View view(in);
  const Problem& problem = view.problem;
  Gradients gradients;
  if (present(grad.rewards)) view.per_token(gradients.rewards, *grad.rewards);
  if (present(grad.kl)) view.per_token(gradients.kl, *grad.kl);
  if (present(grad.sequence_kl)) view.per_row(gradients.sequence_kl, *grad.sequence_kl);
  if (present(grad.sequence_reward)) view.per_row(gradients.sequence_reward, *grad.sequence_reward);
  if (need_logprobs) gradients.logprobs = std::get<0>(out).mutable_data_ptr();
  if (need_scores) gradients.scores = std::get<1>(out).mutable_data_ptr();
  if (in.logprobs.is_cuda()) {
    launch_backward(problem, gradients, in.logprobs);
    return out;
  }
  const auto& cpu = kl_penalized_rewards_kernels_cpu();
  at::parallel_for(0, problem.rows, 2 * rows_a_range(problem),
                   [&](int64_t begin, int64_t end) { cpu.backward(problem, gradients, begin, end); });
  return out;
}

Tensors5 forward_kernel(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, const OptionalTensor& mask,
                        const OptionalTensor& scores, const OptionalTensor& ended, const OptionalTensor& kl_coef,
                        at::ArrayRef<double> numbers) {
  return forward({logprobs, ref_logprobs, mask, scores, ended, kl_coef, numbers});
}

Tensors2 backward_kernel(const OptionalTensor& grad_rewards, const OptionalTensor& grad_kl,
                         const OptionalTensor& grad_sequence_kl, const OptionalTensor& grad_sequence_reward,
                         const at::Tensor& logprobs, const at::Tensor& ref_logprobs, const OptionalTensor& mask,
                         const OptionalTensor& scores, const OptionalTensor& ended, const OptionalTensor& kl_coef,
                         at::ArrayRef<double> numbers, bool need_logprobs, bool need_scores) {
  return backward({logprobs, ref_logprobs, mask, scores, ended, kl_coef, numbers},
                  {grad_rewards, grad_kl, grad_sequence_kl, grad_sequence_reward}, need_logprobs, need_scores);
}

class KlPenalizedRewards : public torch::autograd::Function<KlPenalizedRewards> {
 public:
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  // An optional tensor that is absent is no input of the graph: scores come before the others.
  static constexpr int kArguments = 8, kLogprobs = 0, kScores = 2;

  static Variables forward(Context* ctx, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                           const OptionalTensor& scores, const OptionalTensor& mask, const OptionalTensor& ended,
                           const OptionalTensor& kl_coef, const Numbers& numbers, bool differentiable_rewards) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_kl_penalized_rewards_forward", "")
                               .typed<decltype(forward_kernel)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [rewards, kl, sequence_kl, sequence_reward, stats] =
        op.call(logprobs, ref_logprobs, mask, scores, ended, kl_coef, numbers);
    const auto keep = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({logprobs, ref_logprobs, keep(mask), keep(scores), keep(ended), keep(kl_coef)});
    ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
    ctx->set_materialize_grads(false);
    Variables constants{stats};
    if (!differentiable_rewards) constants.insert(constants.end(), {rewards, sequence_reward});
    if (!logprobs.requires_grad()) constants.insert(constants.end(), {kl, sequence_kl});
    ctx->mark_non_differentiable(constants);
    return {rewards, kl, sequence_kl, sequence_reward, stats};
  }

  static Variables backward(Context* ctx, Variables grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "kl_penalized_rewards: a second derivative (create_graph=True) is not implemented");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_kl_penalized_rewards_backward", "")
                               .typed<decltype(backward_kernel)>();
    Variables gradients(kArguments);
    const auto t = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const bool of_rewards = grads[0].defined() || grads[3].defined();
    const bool need_logprobs =
        ctx->needs_input_grad(kLogprobs) && (of_rewards || grads[1].defined() || grads[2].defined());
    const bool need_scores = of_rewards && t[3].defined() && ctx->needs_input_grad(kScores);
    if (!need_logprobs && !need_scores) return gradients;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [d_logprobs, d_scores] =
        op.call(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]), t[0], t[1],
                optional(t[2]), optional(t[3]), optional(t[4]), optional(t[5]),
                ctx->saved_data["numbers"].toDoubleVector(), need_logprobs, need_scores);
    if (need_logprobs) gradients[kLogprobs] = d_logprobs;
    if (need_scores) gradients[kScores] = d_scores;
    return gradients;
  }
};

}  // namespace
}  // namespace rewardfuse::kl_rewards

namespace rewardfuse {

Tensors5 kl_penalized_rewards(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, const OptionalTensor& mask,
                              const OptionalTensor& scores, const OptionalTensor& ended, const OptionalTensor& kl_coef,
                              double kl_coef_value, double missing_eos_penalty, double score_low, double score_high,
                              int64_t estimator, int64_t gradient_estimator, double input_low, double input_high,
                              double output_low, double output_high, bool one_past, bool replace,
                              bool differentiable_rewards) {
  check_constant("kl_coef", kl_coef);
  const kl_rewards::Numbers numbers{kl_coef_value,
                                    missing_eos_penalty,
                                    score_low,
                                    score_high,
                                    static_cast<double>(estimator),
                                    static_cast<double>(gradient_estimator),
                                    input_low,
                                    input_high,
                                    output_low,
                                    output_high,
                                    static_cast<double>(one_past),
                                    static_cast<double>(replace)};
  const auto constant = [](const at::Tensor& t) { return t.requires_grad() ? t.detach() : t; };
  OptionalTensor given = scores;
  if (present(scores) && !differentiable_rewards) given = constant(*scores);
  auto out = kl_rewards::KlPenalizedRewards::apply(logprobs, constant(ref_logprobs), given, mask, ended, kl_coef,
                                                   numbers, differentiable_rewards);
  return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3]), std::move(out[4])};
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "kl_penalized_rewards(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? scores, Tensor? ended, "
      "Tensor? kl_coef, float kl_coef_value, float missing_eos_penalty, float score_low, float score_high, "
      "int estimator, int gradient_estimator, float input_low, float input_high, float output_low, "
      "float output_high, bool one_past, bool replace, bool differentiable_rewards) "
      "-> (Tensor rewards, Tensor kl, Tensor sequence_kl, Tensor sequence_reward, Tensor stats)",
      &kl_penalized_rewards);
  m.def(
      "_kl_penalized_rewards_forward(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? scores, "
      "Tensor? ended, Tensor? kl_coef, float[] numbers) "
      "-> (Tensor rewards, Tensor kl, Tensor sequence_kl, Tensor sequence_reward, Tensor stats)");
  m.def(
      "_kl_penalized_rewards_backward(Tensor? grad_rewards, Tensor? grad_kl, Tensor? grad_sequence_kl, "
      "Tensor? grad_sequence_reward, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? scores, "
      "Tensor? ended, Tensor? kl_coef, float[] numbers, bool need_logprobs, bool need_scores) "
      "-> (Tensor d_logprobs, Tensor d_scores)");
}

// The CUDA key is registered in every build: without CUDA kernels it says so by name.
#define REWARDFUSE_IMPL(key)                                                \
  TORCH_LIBRARY_IMPL(rewardfuse, key, m) {                                  \
    m.impl("_kl_penalized_rewards_forward", &kl_rewards::forward_kernel);   \
    m.impl("_kl_penalized_rewards_backward", &kl_rewards::backward_kernel); \
  }
REWARDFUSE_IMPL(CPU)
REWARDFUSE_IMPL(CUDA)
REWARDFUSE_IMPL(Meta)
#undef REWARDFUSE_IMPL

}  // namespace rewardfuse
